"""Which words of a prompt the demo's text encoder does not know, read from its weights, and when that is said."""
import json
from pathlib import Path

import pytest
import torch
from stillmotion.nodes.common import vocabulary
from stillmotion.nodes.common.demo import DYNAMICRAFTER
from stillmotion.nodes.common.files import read_checkpoint
from stillmotion.nodes.dynamicrafter import checkpoint
from stillmotion.nodes.training.encoding import Encoders

API = sorted((Path(__file__).resolve().parents[2] / "workflows" / "api").glob("*.json"))


@pytest.fixture(scope="module")
def clip():
    with torch.inference_mode():
        return checkpoint.load(read_checkpoint(DYNAMICRAFTER)).clip


@pytest.fixture
def said(monkeypatch):
    found = []
    monkeypatch.setattr(vocabulary, "say_on_node", lambda text: found.append(text) if text else None)
    return found


@pytest.mark.parametrize("prompt, names", [
    ("a cat", '"cat"'), ("(Kittens:1.3) play", '"kittens", "play"'), ("一只猫", '"一只猫"'),
    ("café, 2 dogs!", '"café", "2", "dogs"'),
    ("one two three four five six seven eight nine ten", '"seven", "eight" and others')])
def test_words_that_it_does_not_know_are_named(clip, prompt, names):
    text = clip.unknown_words(clip.tokenize(prompt))
    assert f"{names}. It knows words such as" in text
    assert ", background, black, blue, brown, circle, " in text and "Your photo to video" in text


@pytest.mark.parametrize("prompt", ["", "  ,.", "red", "a cyan square moves down", "the red circle is moving right",
                                    "a blue square and a dog", "a red circle, moves (left:1.2)", "up " * 100])
def test_nothing_is_said_of_a_prompt_that_it_knows_for_the_most_part(clip, prompt):
    assert clip.unknown_words(clip.tokenize(prompt)) == ""


def test_nothing_is_said_of_the_templates(clip):
    texts = {value for path in API for node in json.loads(path.read_text()).values()
             for name, value in node["inputs"].items() if name in ("text", "prompt") and isinstance(value, str)}
    assert len(texts) > 1 and [text for text in texts if clip.unknown_words(clip.tokenize(text))] == []


def test_it_is_said_when_a_prompt_is_encoded_by_any_node_but_not_of_captions(clip, said):
    with torch.inference_mode():
        for one in (clip, clip.clone()):  # a LoRA loader clones
            one.encode_from_tokens_scheduled(one.tokenize("a cat"))
        assert len(said) == 2 and '"cat"' in said[1]
        Encoders(None, clip, None).text("a cat")
    assert len(said) == 2


def test_other_models_know_other_words(clip):
    other = clip.clone()
    other.known_V = torch.zeros_like(clip.known_V)
    other.known_V[[token for token, _ in clip.tokenize("a dog")["h"][0]]] = True
    assert other.unknown_words(other.tokenize("a dog")) == ""
    assert '"red", "square". It knows words such as a, dog. ' in other.unknown_words(other.tokenize("a red square"))
    other.known_V[:] = True  # published models
    assert other.unknown_words(other.tokenize("a cat on a mat")) == ""


def test_vectors_in_a_prompt_are_no_words(clip):
    assert clip.unknown_words({"h": [[(49406, 1.0), (torch.zeros(32), 1.0), (49407, 1.0)]]}) == ""
