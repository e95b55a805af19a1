"""The text of a batch and the cache that holds it: which slots count, what moves, what is dropped.

A *slot* holds one token of the cache; every target forward takes as many for each row as its window has tokens. Rows
accept unequal numbers of drafts, so that slots of rejected drafts stay behind in rows that accepted fewer: *dead*
slots, hidden by the mask, while positions count live tokens only. Dead slots at the end are cut off, those in the
middle are closed up when they are too many. One row has neither mask nor positions unless its drafts form a tree.

Letters: B rows, L slots in use, S tokens of a window, J slots that move, T tokens of a prompt.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from cpdlm.decoding.model import DraftingModel
from cpdlm.model.trunk import Mask

# Close up once more than this share of the slots (and a handful of them) is dead in every row.
WASTE, LEAST = 0.25, 16


def window_refusal(window: int | None) -> str:
    return (
        f"some layers of this model attend to the last {window} slots of the cache alone, which the drafts of several "
        "rows or of a tree would fill; decode one row at a time, with draft='chain'"
    )


class Text:
    """use_cache=False recomputes every slot in every target forward: the same numbers, slower."""

    def __init__(self, model: DraftingModel, rows: int, device: torch.device, use_cache: bool) -> None:
        self.model, self.context, self.device = model, model.context, device
        self.attention_window: int | None = model.attention_window
        self.cache = model.new_cache() if use_cache else None
        self.slots = self.size = 0  # in use, and those of them that the last window took
        self.ragged = rows > 1
        # Of every slot in use: whether it counts and its position, where rows differ; its token, without a cache.
        nothing_BL = torch.zeros(rows, 0, dtype=torch.long, device=device)
        self.live_BL, self.positions_BL, self.tokens_BL = nothing_BL.bool(), nothing_BL, nothing_BL
        self.lengths = [0] * rows

    def prefill(self, prompts: Sequence[Tensor]) -> Tensor:
        """Hidden states (B, 1, D) behind the prompts, (T,) ids each, which are aligned at their ends."""
        longest = max(len(prompt) for prompt in prompts)
        window_BT = torch.stack([torch.nn.functional.pad(prompt, (longest - len(prompt), 0)) for prompt in prompts])
        live_BT = torch.tensor(
            [[t >= longest - len(prompt) for t in range(longest)] for prompt in prompts], device=self.device
        )
        positions_BT = (live_BT.cumsum(dim=1) - 1).clamp(min=0)
        hidden_BTD = self._run(window_BT, positions_BT, live_BT, None)
        self._append(window_BT, positions_BT, live_BT)
        self.lengths, self.size = [len(prompt) - 1 for prompt in prompts], 1  # the last token is a window to commit
        return hidden_BTD[:, -1:]

    def run(self, window_BS: Tensor, depth_BS: Tensor | None = None, seen_BSS: Tensor | None = None) -> Tensor:
        """Hidden states (B, S, D) of a window behind the text; `commit` then says what stays of it.

        A chain by default. For a tree: depth_BS, how far behind the first token each one is, and seen_BSS, whether
        token s (row) sees token j of the window (column), itself included. Raises ValueError where slots that do not
        count would push others out of a layer's attention window.
        """
        positions_BS = live_BS = torch.ones_like(window_BS, dtype=torch.bool)
        if self.ragged or seen_BSS is not None:
            if self._binds(window_BS.shape[1]) and not self.model.masks_windows:
                if self.ragged:
                    self._close_up()
                if self._binds(window_BS.shape[1]):
                    raise ValueError(window_refusal(self.attention_window))
            if depth_BS is None:
                depth_BS = torch.arange(window_BS.shape[1], device=self.device).expand_as(window_BS)
            # Drafts beyond the context are never emitted; any position will do for them.
            lengths_B1 = torch.tensor(self.lengths, device=self.device).unsqueeze(1)
            positions_BS = (lengths_B1 + depth_BS).clamp(max=self.context - 1)
        hidden_BTD = self._run(window_BS, positions_BS, live_BS, seen_BSS)
        self._append(window_BS, positions_BS, live_BS)
        self.size = window_BS.shape[1]
        return hidden_BTD[:, -self.size :]

    def commit(self, accepted: Sequence[int], path_BJ: Tensor | None = None) -> None:
        """Of the last window each row keeps the first token and `accepted[row]` more: the next ones, or those that
        path_BJ names (positions within the window, one row each, in order; entries beyond accepted[row] are not
        read)."""
        start, most = self.slots - self.size + 1, max(accepted)
        if path_BJ is not None and most:
            self._move(start, path_BJ[:, :most] + (start - 1))
        self._cut(self.size - 1 - most)
        self.lengths = [length + 1 + count for length, count in zip(self.lengths, accepted, strict=True)]
        if self.ragged and most:
            accepted_B1 = torch.tensor(accepted, device=self.device).unsqueeze(1)
            self.live_BL[:, start:] = torch.arange(most, device=self.device) < accepted_B1
        dead = self.slots - max(self.lengths)
        if dead > max(LEAST, WASTE * self.slots):
            self._close_up()

    def select(self, rows: Sequence[int]) -> None:
        """Go on with these rows alone."""
        index_B = torch.tensor(list(rows), device=self.device)
        self.lengths = [self.lengths[row] for row in rows]
        self.live_BL, self.positions_BL, self.tokens_BL = (
            each[index_B] for each in (self.live_BL, self.positions_BL, self.tokens_BL)
        )
        if self.cache is not None:
            self.cache.batch_select_indices(index_B)

    def _binds(self, size: int) -> bool:
        """Whether a window of so many tokens would push others out of some layer's attention window."""
        return self.attention_window is not None and self.slots + size > self.attention_window

    # --- one forward -----------------------------------------------------------------------------------------------

    def _run(self, window_BS: Tensor, positions_BS: Tensor, live_BS: Tensor, seen_BSS: Tensor | None) -> Tensor:
        if self.cache is None:
            window_BS = torch.cat([self.tokens_BL, window_BS], dim=1)
        if not self.ragged and seen_BSS is None:  # positions and mask are what the model takes by itself
            return self.model.hidden(window_BS, cache=self.cache)
        before_BL, indices_BL = self.live_BL, self.positions_BL
        if not self.ragged:
            before_BL = live_BS.new_ones(1, self.slots)
            indices_BL = torch.arange(self.slots, device=self.device).unsqueeze(0)
        if self.cache is None:
            positions_BS = torch.cat([indices_BL, positions_BS], dim=1)
        mask: Mask = torch.cat([before_BL, live_BS], dim=1)
        size = live_BS.shape[1]
        if binds := self._binds(size) and self.model.masks_windows:
            own_SS = torch.eye(size, dtype=torch.bool, device=self.device)
            chain_SS = torch.ones_like(own_SS).tril()
            seen_BSS = (chain_SS & live_BS.unsqueeze(1)) | own_SS if seen_BSS is None else seen_BSS
        if seen_BSS is not None:
            mask = every = self._tree_mask(before_BL, seen_BSS, whole=self.cache is None)
            if binds:
                assert self.attention_window is not None
                keys_BT = positions_BS if self.cache is None else torch.cat([indices_BL, positions_BS], dim=1)
                far_BST = positions_BS.unsqueeze(2) - keys_BT.unsqueeze(1)
                mask = every, every & (far_BST < self.attention_window).unsqueeze(1)
        return self.model.hidden(window_BS, positions_BS, self.cache, mask)

    def _tree_mask(self, before_BL: Tensor, seen_BSS: Tensor, whole: bool) -> Tensor:
        """(B, 1, S, L+S) boolean; whole: (B, 1, L+S, L+S), for a forward that recomputes the text."""
        batch, size, slots = len(seen_BSS), seen_BSS.shape[1], self.slots
        window_BST = torch.cat([before_BL.unsqueeze(1).expand(-1, size, -1), seen_BSS], dim=2)
        if not whole:
            return window_BST.unsqueeze(1)
        causal_LL = torch.ones(slots, slots, dtype=torch.bool, device=self.device).tril()
        # A dead slot sees itself: a row without anything to attend to would be NaN.
        own_LL = torch.eye(slots, dtype=torch.bool, device=self.device)
        text_BLL = (causal_LL & before_BL.unsqueeze(1)) | own_LL
        text_BLT = torch.cat([text_BLL, text_BLL.new_zeros(batch, slots, size)], dim=2)
        return torch.cat([text_BLT, window_BST], dim=1).unsqueeze(1)

    # --- bookkeeping --------------------------------------------------------------------------------------------

    def _append(self, window_BS: Tensor, positions_BS: Tensor, live_BS: Tensor) -> None:
        self.slots += window_BS.shape[1]
        if self.cache is None:
            self.tokens_BL = torch.cat([self.tokens_BL, window_BS], dim=1)
        if self.ragged:
            self.positions_BL = torch.cat([self.positions_BL, positions_BS], dim=1)
            self.live_BL = torch.cat([self.live_BL, live_BS], dim=1)

    def _held(self) -> list[Tensor]:
        """The per-slot tensors in use, all (B, L)."""
        return [each for each in (self.live_BL, self.positions_BL, self.tokens_BL) if each.shape[1] == self.slots]

    def _cut(self, count: int) -> None:
        if count == 0:
            return
        if self.cache is not None:
            self.cache.crop(-count)  # a negative count of tokens to remove, in every transformers since 5.0
        self.slots -= count
        self.live_BL, self.positions_BL, self.tokens_BL = (
            each[:, : self.slots] for each in (self.live_BL, self.positions_BL, self.tokens_BL)
        )

    def _move(self, start: int, source_BJ: Tensor) -> None:
        """Slots start, start+1, .. become those of `source_BJ`."""
        stop = start + source_BJ.shape[1]
        for each in self._held():
            each[:, start:stop] = each.gather(1, source_BJ)
        for each in self._keys_and_values():
            index = source_BJ[:, None, :, None].expand(-1, each.shape[1], -1, each.shape[3])
            each[:, :, start:stop] = each.gather(2, index)

    def _close_up(self) -> None:
        """Move the live slots of every row to the end, in order, and drop what no row needs."""
        longest = max(self.lengths)
        order_BL = self.live_BL.long().sort(dim=1, stable=True).indices[:, -longest:]  # dead ones first
        self._move(0, order_BL)
        self._cut(self.slots - longest)

    def _keys_and_values(self) -> list[Tensor]:
        """(B, heads, L, width) each."""
        if self.cache is None:
            return []
        return [each for layer in self.cache.layers for each in (layer.keys, layer.values)]
