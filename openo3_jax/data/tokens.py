"""Chat messages with pictures -> a tokenised Sample; tokens -> text. Equal to transformers' Qwen2_5_VLProcessor."""

import dataclasses
import functools
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jinja2
import numpy as np
from jaxtyping import Bool, Int, Int32, UInt8

from openo3_jax import config as config_lib
from openo3_jax import types
from openo3_jax.data import patches as patches_lib
from openo3_jax.data import positions, processor_files
from openo3_jax.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROLES = ("system", "user", "assistant")
# What the assistant says, with the token that ends it, in a rendered conversation.
_ASSISTANT_TURN = re.compile(r"<\|im_start\|>assistant\n(.*?<\|im_end\|>)", re.DOTALL)

Message = Any  # {"role", "content": str or a list of text and picture items}; `encode` checks it


@dataclasses.dataclass(frozen=True, kw_only=True)
class Processor:
    """Tokenizer, chat template and image settings of one model directory; `load_processor` makes it."""

    tokenizer: "PreTrainedTokenizerBase"
    chat_template: str | None  # None: the tokenizer's own
    config: config_lib.ModelConfig
    image_settings: processor_files.ImageSettings
    stop_ids: tuple[int, ...]  # generating any of these ends a completion

    @property
    def image_sizing(self) -> processor_files.ImageSizing:
        return self.image_settings.sizing

    @property
    def pad_id(self) -> int:
        pad = self.tokenizer.pad_token_id
        return self.tokenizer.convert_tokens_to_ids("<|endoftext|>") if pad is None else pad

    @functools.cached_property
    def special_tokens(self) -> Mapping[str, int]:
        """Every token the tokenizer marks as special -> its id."""
        added = self.tokenizer.added_tokens_decoder.items()
        special = {token.content: number for number, token in added if token.special}
        named = zip(self.tokenizer.all_special_tokens, self.tokenizer.all_special_ids, strict=True)
        return special | dict(named)

    def banned_ids(self, vocab_size: int) -> Int32[np.ndarray, " banned"]:
        """Ids below `vocab_size` that a completion must not hold, ascending.

        Every special token but the stops, and every id that the tokenizer has no token for.
        """
        known = np.zeros(vocab_size, bool)
        ids = np.array([*self.tokenizer.get_vocab().values()])
        known[ids[ids < vocab_size]] = True
        known[[i for i in self.special_tokens.values() if i < vocab_size and i not in self.stop_ids]] = False
        return np.flatnonzero(~known).astype(np.int32)

    def decode(self, tokens: Int[np.ndarray, " tokens"] | Sequence[int]) -> str:
        """The text of `tokens`, special tokens removed, spaces as they are."""
        ids = [int(token) for token in tokens]
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def encode(
        self, messages: Sequence[Message], *, add_generation_prompt: bool | None = None, hollow: bool = False
    ) -> types.Sample:
        """Render `messages` with the directory's chat template and tokenise them; nothing is ever cut off.

        A message is {"role": "system" | "user" | "assistant", "content": str or items}, an item
        {"type": "text", "text": str} or {"type": "picture", "picture": types.Picture}. A still stands as
        `<|image_pad|>`, native video as `<|video_pad|>`, once per visual token. `add_generation_prompt`: None adds
        it unless the last message is the assistant's. In `loss_mask`, the assistant's tokens reach from the first
        with a character of its text to `<|im_end|>`. `hollow`: patches are zeros that take no memory, for planning.

        Raises: InputError for malformed messages, for text that holds a special token (it would be read as
        control), and for a template that loses pictures or the assistant's text.
        """
        _check_messages(messages, self.special_tokens)
        if add_generation_prompt is None:
            add_generation_prompt = messages[-1]["role"] != "assistant"
        text = self._render(messages, add_generation_prompt)
        encoded = self.tokenizer(text, return_offsets_mapping=True)
        tokens = np.array(encoded["input_ids"], np.int32)
        loss_mask = _assistant_mask(text, np.array(encoded["offset_mapping"]).reshape(-1, 2), messages)
        pictures = _pictures(messages)
        grids = tuple(patches_lib.grid_of(picture.pixels, **self._cut) for picture in pictures)
        seconds = [picture.seconds_per_grid for picture in pictures]

        is_visual = self._is_visual(tokens)
        expected = [self._placeholder(picture) for picture in pictures]
        if tokens[is_visual].tolist() != expected:
            raise InputError(
                f"chat template: rendered {int(is_visual.sum())} picture placeholders for {len(pictures)} pictures, "
                "or not in their order; expected one for each, <|image_pad|> or <|video_pad|>; check the template"
            )
        counts = np.ones(len(tokens), np.int64)
        counts[is_visual] = [grid.num_patches // self.config.vision.merge_unit for grid in grids]
        tokens = np.repeat(tokens, counts)
        return types.Sample(
            tokens=tokens,
            positions=positions.mrope_positions(tokens, grids, seconds, self.config),
            loss_mask=np.repeat(loss_mask & ~is_visual, counts),
            is_visual=np.repeat(is_visual, counts),
            patches=self._hollow_patches(grids) if hollow else self._patches(pictures, grids),
            grids=grids,
        )

    def _render(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        try:
            return self.tokenizer.apply_chat_template(
                [_to_hf(message) for message in messages],
                chat_template=self.chat_template,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )
        except jinja2.TemplateError as error:
            raise InputError(f"chat template: cannot render these messages ({error})") from None

    def _placeholder(self, picture: types.Picture) -> int:
        is_still = picture.seconds_per_grid is None
        return self.config.image_token_id if is_still else self.config.video_token_id

    def _is_visual(self, tokens: Int[np.ndarray, " seq"]) -> Bool[np.ndarray, " seq"]:
        return (tokens == self.config.image_token_id) | (tokens == self.config.video_token_id)

    @property
    def _cut(self) -> dict[str, int]:
        settings = self.image_settings
        return {
            "patch_size": settings.patch_size,
            "temporal_patch_size": settings.temporal_patch_size,
            "merge_size": settings.merge_size,
        }

    def _patches(
        self, pictures: Sequence[types.Picture], grids: Sequence[types.VisionGrid]
    ) -> UInt8[np.ndarray, "patches patch_dim"]:
        patches = np.empty((sum(grid.num_patches for grid in grids), self.config.vision.patch_dim), np.uint8)
        start = 0
        for picture, grid in zip(pictures, grids, strict=True):
            part = patches[start : start + grid.num_patches]
            patches_lib.to_patches(picture.pixels, **self._cut, out=part)
            start += grid.num_patches
        return patches

    def _hollow_patches(self, grids: Sequence[types.VisionGrid]) -> UInt8[np.ndarray, "patches patch_dim"]:
        num = sum(grid.num_patches for grid in grids)
        return np.broadcast_to(np.uint8(0), (num, self.config.vision.patch_dim))


def _items(message: Message) -> Sequence[Mapping[str, Any]]:
    content = message["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _pictures(messages: Sequence[Message]) -> list[types.Picture]:
    return [item["picture"] for message in messages for item in _items(message) if item["type"] == "picture"]


def _to_hf(message: Message) -> dict[str, Any]:
    """The message as chat templates know it: pictures become image and video items without their pixels."""
    if isinstance(message["content"], str):
        return {"role": message["role"], "content": message["content"]}
    content = []
    for item in message["content"]:
        if item["type"] == "text":
            content.append({"type": "text", "text": item["text"]})
        else:
            content.append({"type": "image" if item["picture"].seconds_per_grid is None else "video"})
    return {"role": message["role"], "content": content}


def _check_messages(messages: Sequence[Message], special_tokens: Mapping[str, int]) -> None:
    if isinstance(messages, str | Mapping) or not messages:
        raise InputError("messages: expected a non-empty list of {'role', 'content'}")
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
            raise InputError(f"{where}: expected a dict with 'role' and 'content', got {message!r:.80}")
        if message["role"] not in ROLES:
            raise InputError(f"{where}: role is {message['role']!r}; expected one of {', '.join(ROLES)}")
        if not isinstance(message["content"], str | list | tuple):
            got = type(message["content"]).__name__
            raise InputError(f"{where}: content is {got}; expected a string or a list of text and picture items")
        for number, item in enumerate(_items(message)):
            _check_item(item, f"{where} item {number}", special_tokens)


def _check_item(item: Any, where: str, special_tokens: Mapping[str, int]) -> None:
    kind = item.get("type") if isinstance(item, Mapping) else None
    if kind == "picture" and isinstance(item.get("picture"), types.Picture):
        return
    if kind != "text" or not isinstance(item.get("text"), str):
        raise InputError(
            f"{where}: got {item!r:.80}; expected {{'type': 'text', 'text': str}} or "
            "{'type': 'picture', 'picture': types.Picture}"
        )
    found = [token for token in special_tokens if token in item["text"]]
    if found:
        raise InputError(
            f"{where}: the text holds the special token {found[0]}, which the model would read as control; "
            "remove it or write it another way"
        )


def _assistant_mask(
    text: str, offsets: Int[np.ndarray, "seq 2"], messages: Sequence[Message]
) -> Bool[np.ndarray, " seq"]:
    """True where a token holds a character of what the assistant says, `<|im_end|>` included."""
    said = [message for message in messages if message["role"] == "assistant"]
    turns = list(_ASSISTANT_TURN.finditer(text))
    if len(turns) != len(said):
        raise InputError(
            f"chat template: rendered {len(turns)} assistant turns for {len(said)} assistant messages; expected "
            "'<|im_start|>assistant', a newline, the text and '<|im_end|>' for each"
        )
    if messages[-1]["role"] == "assistant":
        last = [item["text"].strip() for item in _items(messages[-1]) if item["type"] == "text"]
        lost = [piece for piece in last if piece not in turns[-1].group(1)]
        if lost:
            raise InputError(
                f"chat template: leaves out text of the last assistant message, {lost[0]!r:.60}; "
                "use a template that keeps it"
            )
    mask = np.zeros(len(offsets), bool)
    for turn in turns:
        start, stop = turn.span(1)
        mask |= (offsets[:, 1] > start) & (offsets[:, 0] < stop)
    return mask


def load_processor(directory: str | os.PathLike) -> Processor:
    """The processor of a model directory in HF layout; nothing is downloaded and no code of it is run.

    Reads config.json, the tokenizer's files, the chat template (of chat_template.json, chat_template.jinja or
    tokenizer_config.json), preprocessor_config.json (or what transformers 5 writes, processor_config.json) and, if
    there, generation_config.json.

    Raises: InputError naming the file that is missing or cannot be used.
    """
    directory = pathlib.Path(directory)
    if not directory.is_dir():
        raise InputError(f"{directory}: no such model directory")
    config = processor_files.load_model_config(directory)
    tokenizer = processor_files.load_tokenizer(directory)
    for token, field in (("<|image_pad|>", "image_token_id"), ("<|video_pad|>", "video_token_id")):
        if tokenizer.convert_tokens_to_ids(token) != getattr(config, field):
            raise InputError(
                f"{directory}: config.json has {field}={getattr(config, field)}, but {token} is "
                f"{tokenizer.convert_tokens_to_ids(token)} in the tokenizer; both must come from one model"
            )
    image_settings = processor_files.load_image_settings(directory, config.vision)
    vision = dataclasses.replace(config.vision, image_mean=image_settings.mean, image_std=image_settings.std)
    return Processor(
        tokenizer=tokenizer,
        chat_template=processor_files.load_chat_template(directory, tokenizer),
        config=dataclasses.replace(config, vision=vision),
        image_settings=image_settings,
        stop_ids=processor_files.load_stop_ids(directory, tokenizer),
    )
