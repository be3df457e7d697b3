"""The place of each token in the text of its sequence."""

from __future__ import annotations

from ...text.tokenizer import Codec


class Places:
    """Follows the tokens after ``prompt``, whose text begins at ``offset``. Tokens that share a
    character have the same place.

    ``opening``: the next token that has text is the first one of the text.
    """

    def __init__(self, codec: Codec, skip_special_tokens: bool, prompt: list[int], offset: int = 0) -> None:
        self._codec = codec
        self._skip = skip_special_tokens
        self._detokenizer = codec.detokenizer(skip_special_tokens, prompt)
        self._offset = offset
        self.opening = not any(codec.is_shown(token, skip_special_tokens) for token in prompt)

    def take(self, token: int) -> int:
        """The place of the next token."""
        place = self._offset
        self._offset += len(self._detokenizer.push(token))
        self.opening = self.opening and not self._codec.is_shown(token, self._skip)
        return place
