"""The words that a small text encoder knows: its file keeps zero weights for tokens that no caption used."""
from __future__ import annotations

import comfy.sd

from .demo import TRAINED_SIZE
from .notes import say_on_node

START, END, PAD = 49406, 49407, 0  # tokens of no word
SHOWN = 8  # unknown words in a note


class VocabularyClip(comfy.sd.CLIP):
    """Core's CLIP, which says on the node that encodes a prompt if the encoder does not know most of its words.

    Captions of a training go through `encode_from_tokens`, so nothing is said of them. `known_V`: whether a token has
    weights. `trained_size`: width and height in pixels of the pictures of a small model whose encoder this is; the
    conditioning tells it to the nodes of models that need a certain encoder.
    """

    known_V = trained_size = None

    def clone(self, *args, **kwargs):
        copy = super().clone(*args, **kwargs)
        copy.__class__, copy.known_V, copy.trained_size = type(self), self.known_V, self.trained_size
        return copy

    def encode_from_tokens_scheduled(self, tokens, *args, **kwargs):
        say_on_node(self.unknown_words(tokens))
        conditioning = super().encode_from_tokens_scheduled(tokens, *args, **kwargs)
        if self.trained_size:
            for _, entries in conditioning:
                entries[TRAINED_SIZE] = self.trained_size
        return conditioning

    def unknown_words(self, tokens: dict[str, list]) -> str:
        """What to say of a tokenized prompt; "" if more than half of its words are known: the others are in every
        sentence ("the", "is"), or the known ones say enough."""
        words = {text: self.known_V[word].all() for word in self._words(tokens)
                 if any(map(str.isalnum, text := self._text(word)))}
        unknown = [text for text, known in words.items() if not known]
        if not unknown or 2 * len(unknown) < len(words):
            return ""
        names = ", ".join(f'"{text}"' for text in unknown[:SHOWN]) + (" and others" if len(unknown) > SHOWN else "")
        return (f"This small model does not know {names}. It knows words such as {', '.join(self.known_words())}. For "
                "other prompts choose a real checkpoint: the template 'Your photo to video' says which file goes "
                "where.")

    def known_words(self) -> list[str]:
        """The words of one token that have weights."""
        ids = self.known_V.nonzero().flatten().tolist()
        pieces = {token: self._tokenizer.inv_vocab[token] for token in ids}
        return sorted(self._text([token]) for token, piece in pieces.items()
                      if piece.endswith("</w>") and piece.removesuffix("</w>").isalnum())

    def _words(self, tokens: dict[str, list]) -> list[list[int]]:
        """The tokens of each word. Textual inversions, which are vectors, are left out."""
        words, word = [], []
        for part in tokens.values():
            for token, *_ in (entry for window in part for entry in window):
                if isinstance(token, int) and token not in (START, END, PAD):
                    word.append(token)
                    if self._tokenizer.inv_vocab[token].endswith("</w>"):
                        words.append(word)
                        word = []
        return words

    def _text(self, word: list[int]) -> str:
        return self._tokenizer.tokenizer.decode(word).strip()

    @property
    def _tokenizer(self):
        return self.tokenizer.clip_h
