"""Runs that take prompts while they sample: they can be repeated bit for bit, and bad messages are answered."""

from types import SimpleNamespace

import comfy.model_management
import pytest
import torch
from causal_wan_stub import SIZES, conditioning, draw, latent, load, settings, strong_tensors, timeline_of
from stillmotion.nodes.causal_wan import nodes_live, run
from stillmotion.nodes.causal_wan.conditioning import CHUNK, PREFIX, StartFrames
from stillmotion.nodes.causal_wan.mailbox import LONGEST_PROMPT, Mailbox, Mailboxes, Refused
from stillmotion.nodes.causal_wan.resume import BlockFolder
from stillmotion.nodes.causal_wan.timeline import Prompts, parse_timeline

UP, DOWN = "a circle moves up", "a circle moves down"


class Clip:
    """A text encoder whose tokens depend on the text only."""

    def __init__(self, width=24):
        self.width, self.patcher = width, load(strong_tensors()).clone()

    def tokenize(self, text):
        return sum(text.encode())

    def encode_from_tokens_scheduled(self, tokens):
        return [[draw(tokens, 1, 6, self.width), {"pooled_output": None}]]


@pytest.fixture(autouse=True)
def as_in_the_host():
    with torch.inference_mode():
        yield


def prepared(kind="t2v", frames=10, start=None, timeline=None, clip=None, length=0, positive=None, **changes):
    positive = positive or conditioning(kind, frames, 1)
    return run.prepare(load(strong_tensors(kind), weight_dtype="fp32"), positive, conditioning(kind, frames, 2),
                       latent(kind, frames, start=start), timeline, 3, settings(**changes), length=length, clip=clip)


def steered(messages, path=None, **arguments):
    """Sample with `messages` {step: text} sent at these steps: (latent, steering, what was told)."""
    made = prepared(clip=Clip(), **arguments)
    folder, told = BlockFolder(path, made.fingerprint()) if path else None, []
    with nodes_live.live(made, 16.0, folder) as shown:
        shown.steering.tell = lambda **values: told.append(values)

        def callback(step, *_):
            if step in messages:
                shown.steering.mailbox.send(messages[step])

        return made.sample(callback, folder, steering=shown.steering)["samples"], shown.steering, told


RUNS = {  # steps are counted from 0, two a block of 2 latent frames
    "one prompt": ({}, {1: UP}, [(2, UP)]),
    "two, with guidance and a window": ({"cfg": 2.0, "window": 4, "sink": 1}, {3: UP, 6: DOWN}, [(4, UP), (8, DOWN)]),
    "new sink, far from the start": ({"window": 4, "sink": 2, "endless": True, "global_sink": False}, {5: UP},
                                     [(6, UP)]),
    "after a still": ({"frames": 8, "start": StartFrames(CHUNK, 2, 2, True)}, {0: UP}, [(3, UP)]),
    "after a prefix": ({"frames": 7, "start": StartFrames(PREFIX, 1, 2, False), "window": 5}, {1: UP}, [(3, UP)]),
    "image to video": ({"kind": "i2v"}, {3: UP}, [(4, UP)]),
    "between planned ones": ({"timeline": (0, 3, 8)}, {2: UP}, [(4, UP)]),
    "before a planned one": ({"timeline": (5,), "window": 4}, {1: UP}, [(2, UP)]),
    "the last of two for a block": ({}, {2: UP, 3: DOWN}, [(4, DOWN)]),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_steered_run_is_repeated_bit_for_bit_from_its_timeline(name):
    arguments, messages, sent = RUNS[name]
    kind, frames = arguments.get("kind", "t2v"), arguments.get("frames", 10)
    planned = timeline_of(kind, frames, *arguments.pop("timeline", ()))
    positive = conditioning(kind, frames, 1)
    found, steering, told = steered(messages, timeline=planned, positive=positive, **arguments)
    plain = prepared(timeline=planned, **arguments).sample()["samples"]
    begins = sent[0][0]
    assert torch.equal(found[:, :, :begins], plain[:, :, :begins])
    assert not torch.allclose(found[:, :, begins:], plain[:, :, begins:])
    assert steering.sent == sent == [(entry["frame"], entry["text"]) for entry in told]
    again = prepared(timeline=steering.timeline(positive), **arguments).sample()["samples"]
    assert torch.equal(again, found)


def test_a_prompt_before_the_first_block_replaces_the_positive_one():
    made = prepared(clip=Clip())
    positive = conditioning("t2v", 10, 1)
    with nodes_live.live(made, 16.0, None) as shown:
        shown.steering.mailbox.send(UP)
        found = made.sample(steering=shown.steering)["samples"]
    timeline = shown.steering.timeline(positive)
    assert timeline.starts == (0,)
    assert torch.equal(prepared(timeline=timeline).sample()["samples"], found)
    assert torch.equal(prepared(positive=Clip().encode_from_tokens_scheduled(Clip().tokenize(UP))).sample()["samples"],
                       found)


def test_without_messages_a_text_encoder_changes_nothing():
    found, steering, told = steered({})
    assert torch.equal(found, prepared().sample()["samples"]) and told == []
    assert steering.timeline(steering.prompts.prompts[0]) == ((), ())
    assert nodes_live.used_prompts(steering) == ""


def test_the_summary_holds_lines_for_a_prompt_timeline():
    _, steering, _ = steered({1: UP, 5: DOWN})
    assert parse_timeline(nodes_live.used_prompts(steering).split("Timeline:")[1]) == steering.sent


def test_a_prompt_that_does_not_fit_the_model_is_told_and_the_video_goes_on(monkeypatch):
    monkeypatch.setattr(Clip, "encode_from_tokens_scheduled", lambda self, tokens: [[draw(1, 1, 6, 32), {}]])
    found, steering, told = steered({1: UP})
    assert torch.equal(found, prepared().sample()["samples"]) and steering.sent == []
    assert told[0]["text"] == UP and "tokens 32 wide" in told[0]["error"]


def test_a_steered_run_goes_on_from_its_stored_blocks(tmp_path):
    def stop(step, *_):
        if step == 6:
            comfy.model_management.interrupt_current_processing(True)

    made = prepared(clip=Clip())
    with nodes_live.live(made, 16.0, None) as shown, pytest.raises(comfy.model_management.InterruptProcessingException):
        shown.steering.mailbox.waiting = UP
        made.sample(stop, BlockFolder(tmp_path, made.fingerprint()), steering=shown.steering)
    timeline = shown.steering.timeline(conditioning("t2v", 10, 1))
    again, told = prepared(timeline=timeline), []
    found = again.sample(lambda step, *_: told.append(step), BlockFolder(tmp_path, again.fingerprint()))["samples"]
    assert told[0] == 6 and torch.equal(found, prepared(timeline=timeline).sample()["samples"])


def test_stored_blocks_are_not_steered(tmp_path):
    whole, _, _ = steered({}, tmp_path)
    (tmp_path / "block_000004.safetensors").unlink()
    made = prepared(clip=Clip())
    folder = BlockFolder(tmp_path, made.fingerprint())
    with nodes_live.live(made, 16.0, folder) as shown:
        assert shown.steering.mailbox.send(UP)["block"] == 5
        found = made.sample(folder=folder, steering=shown.steering)["samples"]
    assert torch.equal(found[:, :, :8], whole[:, :, :8]) and not torch.allclose(found[:, :, 8:], whole[:, :, 8:])
    again = prepared(timeline=shown.steering.timeline(conditioning("t2v", 10, 1)))
    told = []
    assert torch.equal(again.sample(lambda *_: told.append(_), BlockFolder(tmp_path, again.fingerprint()))["samples"],
                       found) and told == []


@pytest.mark.parametrize("switches, start, before, expected", [
    ([], 0, 0, ([], ["new"])),
    ([4, 8], 0, 0, ([4, 8], ["new", "b", "c"])),
    ([4, 8], 2, 0, ([2, 4, 8], ["a", "new", "b", "c"])),
    ([3, 8], 4, 2, ([4, 8], ["a", "new", "c"])),
    ([3, 8], 6, 4, ([3, 6, 8], ["a", "b", "new", "c"])),
    ([3, 8], 8, 6, ([3, 8], ["a", "b", "new"])),
])
def test_where_a_prompt_goes_among_the_planned_ones(switches, start, before, expected):
    prompts = Prompts(["a", "b", "c"][:len(switches) + 1], list(switches))
    prompts.begin("new", start, before)
    assert (prompts.switches, prompts.prompts) == expected


# ---- until stopped ----

@pytest.mark.parametrize("kind, changes", [("t2v", {"window": 4, "sink": 1}),
                                           ("t2v", {"window": 4, "independent_first": True, "first_steps": "1000"}),
                                           ("i2v", {"window": 6, "endless": True, "sink": 2})])
def test_until_stopped_makes_the_frames_of_a_run_with_a_length(kind, changes):
    found, steering, _ = stopped_after(3, kind, changes)
    frames = 5 if "first_steps" in changes else 6
    assert found.shape[2] == steering.frames == frames
    whole = prepared(kind, frames, positive=conditioning(kind, 20, 1) if kind == "t2v" else None,
                     **changes).sample()["samples"]
    assert torch.equal(found, whole)


def stopped_after(blocks, kind, changes):
    made = prepared(kind, 6, length=run.UNTIL_STOPPED, clip=Clip(),
                    positive=conditioning(kind, 20, 1) if kind == "t2v" else None, **changes)
    parts = []
    with nodes_live.live(made, 16.0, None) as shown:
        def show(latent_CFHW):
            parts.append(latent_CFHW)
            if len(parts) == blocks:
                shown.steering.mailbox.stop()

        made.stream(None, None, show, shown.steering)
    return torch.cat(parts, dim=1)[None], shown.steering, None


def test_an_image_condition_goes_on_as_its_last_frame():
    """As if it had been made for the whole video, with the last frame's condition repeated."""
    found, *_ = stopped_after(5, "i2v", {"window": 6})
    text, values = conditioning("i2v", 6, 1)[0]
    more = [0, 1, 2, 3, 4, 5, 5, 5, 5, 5]
    longer = {**values, "concat_latent_image": values["concat_latent_image"][:, :, more],
              "concat_mask": values["concat_mask"][:, :, more]}
    whole = prepared("i2v", 10, positive=[[text, longer]], window=6).sample()["samples"]
    assert torch.equal(found, whole)


def test_a_timeline_and_messages_work_until_stopped():
    planned = timeline_of("t2v", 10, 4)
    arguments = dict(window=4, sink=1, timeline=planned)
    messages = iter([None, None, UP, None, "stop"])
    made = prepared(frames=1, length=run.UNTIL_STOPPED, clip=Clip(), **arguments)
    parts = []
    with nodes_live.live(made, 16.0, None) as shown:
        def show(latent_CFHW):
            parts.append(latent_CFHW)
            text = next(messages)
            if text:
                shown.steering.mailbox.stop() if text == "stop" else shown.steering.mailbox.send(text)

        made.stream(None, None, show, shown.steering)
    timeline = shown.steering.timeline(made.positive)
    assert timeline.starts == (4, 6)
    again = prepared(window=4, sink=1, timeline=timeline).sample()["samples"]
    assert torch.equal(torch.cat(parts, dim=1)[None], again)


def test_until_stopped_needs_a_window():
    with pytest.raises(ValueError, match="until stopped needs a window.*at least 3"):
        prepared(length=run.UNTIL_STOPPED, sink=1)


# ---- messages ----

@pytest.mark.parametrize("box, text, status, words", [
    ((1, 4, True), "  ", 400, "text is empty"),
    ((1, 4, True), None, 400, "text is empty"),
    ((1, 4, True), "a\0b", 400, "NUL"),
    ((1, 4, True), "x" * (LONGEST_PROMPT + 1), 400, f"at most {LONGEST_PROMPT}"),
    ((1, 4, False), UP, 409, "connect one to the sampler's clip"),
    ((5, 4, True), UP, 409, "last block is being made"),
])
def test_bad_messages_are_answered_in_words(box, text, status, words):
    with pytest.raises(Refused, match=words) as refused:
        Mailbox(*box).send(text)
    assert refused.value.status == status


def test_messages_find_their_run_while_it_is_in_progress():
    boxes, box = Mailboxes(), Mailbox(1, 4, True)
    with pytest.raises(Refused, match="has not begun") as refused:
        boxes.find(("job", "6"))
    assert refused.value.status == 404
    with boxes.opened(("job", "6"), box):
        assert boxes.find(("job", "6")) is box
        assert box.send(" a circle\nmoves up ") == {"block": 1, "message": "The prompt begins with block 1."}
        assert "instead of 'a circle moves up'" in box.send(DOWN)["message"]
        assert box.take(1) == DOWN and box.take(2) is None and box.send(UP)["block"] == 3
        box.stop()
        with pytest.raises(Refused, match="Too late"):
            box.send(UP)
    with pytest.raises(Refused, match="this run has ended") as refused:
        boxes.find(("job", "6"))
    assert refused.value.status == 409


def test_a_run_tells_a_watching_client_only(monkeypatch):
    sent = []
    server = SimpleNamespace(client_id="me", send_sync=lambda event, data, sid: sent.append((event, data, sid)))
    monkeypatch.setattr(nodes_live, "PromptServer", SimpleNamespace(instance=server))
    monkeypatch.setattr(nodes_live, "get_executing_context", lambda: SimpleNamespace(prompt_id="job", node_id="6"))
    for watching in (False, True):
        monkeypatch.setattr(nodes_live, "watchers", {"me": "frames"} if watching else {"other": "frames"})
        with nodes_live.live(prepared(clip=Clip()), 12.0, None) as shown:
            shown.show(torch.rand(5, 8, 16, 3))
            shown.show(torch.rand(2, 8, 16, 3))
        if not watching:
            assert sent == []
    assert {(event, data["prompt_id"], data["node_id"], sid) for event, data, sid in sent} == {
        ("stillmotion.live", "job", "6", "me")}
    begin, first, second, end = (data for _, data, _ in sent)
    assert (begin["kind"], begin["fps"], begin["blocks"], begin["steers"]) == ("begin", 12.0, 5, True)
    assert [(block["block"], block["frame"], block["count"], block["width"], block["height"], block["columns"])
            for block in (first, second)] == [(1, 0, 5, 16, 8, 3), (2, 5, 2, 16, 8, 2)]
    assert (end["kind"], end["frames"]) == ("end", 7)


@pytest.mark.parametrize("form, length, back, ends", [
    ("mp4", run.UNTIL_STOPPED, False, True), ("mp4", run.UNTIL_STOPPED, True, False),
    ("frames", run.UNTIL_STOPPED, False, False), ("mp4", 0, False, False)],
    ids=["killed command", "command that comes back", "closed page", "video with an end"])
def test_a_run_until_stopped_ends_when_its_command_is_gone(monkeypatch, form, length, back, ends):
    now, sockets = [0.0], {"me": None}
    server = SimpleNamespace(client_id="me", send_sync=lambda *_: None, sockets=sockets)
    monkeypatch.setattr(nodes_live, "PromptServer", SimpleNamespace(instance=server))
    monkeypatch.setattr(nodes_live, "watchers", {"me": form})
    monkeypatch.setattr(nodes_live.time, "monotonic", lambda: now[0])
    with nodes_live.live(prepared(length=length, window=4), 12.0, None) as shown:
        for connected in (True, False, back, False):
            assert not shown.steering.mailbox.stopped
            sockets.clear()
            sockets.update({"me": None} if connected else {})
            now[0] += nodes_live.ALONE_SECONDS / 2 + 1
            shown.show(torch.rand(1, 32, 32, 3))
        assert shown.steering.mailbox.stopped == ends


def test_the_text_encoder_is_loaded_with_the_model():
    clip = Clip()
    made = prepared(clip=clip)
    assert clip.patcher in made.guider.model_patcher.get_nested_additional_models()
    assert SIZES["t2v"].text_dim == clip.width
