"""Target forwards of fixed shape: on a GPU a forward is recorded once, as a CUDA graph, and replayed.

A forward of a small model is hundreds of kernels of a few microseconds each; launched one by one from Python they take
many times as long as they run.

Letters: B rows, L slots of the cache, S = K+1 positions of a window, K drafts, J longest path through them, T tokens of
a prompt, D width, H heads, X numbers of a row.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.cache_utils import Cache, CacheLayerMixin

from cpdlm.decoding.drafters import LOOKUP, Acceptance, Maker, Uniforms, make_drafter
from cpdlm.decoding.drafting import propose
from cpdlm.decoding.filtering import Sampling
from cpdlm.decoding.forwards import Read, last_accepted, packed
from cpdlm.decoding.model import DraftingModel
from cpdlm.decoding.proposals import Proposal, nothing

# Attention with a mask of any form. cuDNN's is left out: it makes plans on the host at run time.
KERNELS = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
WARM_UPS = 3  # runs before a recording: libraries choose kernels and workspaces in them


class SlotIndex:
    """The slots that the tokens of the forward under way go to."""

    slots_BS: Tensor


class SlotLayer(CacheLayerMixin):
    """Keys and values (B, H, L, width) of one layer."""

    is_sliding = False

    def __init__(self, slots: int, index: SlotIndex) -> None:
        super().__init__()
        self.slots, self.index = slots, index

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.keys, self.values = (
            each.new_zeros(*each.shape[:2], self.slots, each.shape[3]) for each in (key_states, value_states)
        )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        for held, new in ((self.keys, key_states), (self.values, value_states)):
            held.scatter_(2, self.index.slots_BS[:, None, :, None].expand_as(new), new)
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.slots, 0

    def get_seq_length(self) -> int:
        return 0  # positions and masks come with every forward

    def get_max_length(self) -> int:
        return self.slots


class CapturedForwards:
    """Target forwards of fixed shape, for texts of at most `slots` tokens, prompt included.

    Draft, target forward, acceptance and commit are one graph without a host decision in it: the cache has a slot for
    every position of every row, how much of it counts is a number on the device, and a rejected draft is undone by not
    counting it. Nothing in the next forward waits for the host, so it is under way while the host reads what the last
    one wrote. On the CPU the same step runs as it is; it is slower there than `GrowingForwards`, and serves the tests.

    Made for one model, number of rows, sampling and draft; reusable for any number of texts. On CUDA, making it takes
    some tenths of a second. uniforms: of the rows that are written; the loop sets it. Raises ValueError for a model in
    training mode, and where a layer of the model attends to fewer slots than there are.
    """

    @torch.inference_mode()
    def __init__(
        self,
        model: DraftingModel,
        rows: int,
        sampling: Sampling,
        *,
        slots: int,
        draft: str | Maker = "chain",
        nodes: int = 8,
        device: torch.device | None = None,
    ) -> None:
        self.model, self.rows, self.sampling, self.draft, self.nodes = model, rows, sampling, draft, nodes
        self.slots = slots
        self.device = device or next(model.parameters()).device  # type: ignore[attr-defined]
        self._check_model()
        self.uniforms: Uniforms | None = None
        self._target = model.target_scores if sampling.greedy else model.target_log_probs
        self._depth = 0 if draft == "none" else model.horizon - 1
        self._noise = None if sampling.greedy else _Noise(rows, self.device)
        self._drafter = make_drafter(draft, sampling, self._noise, nodes)
        self._index = SlotIndex()
        # Two windows more than texts need: the forward that is in vain, and rows that are done, write there.
        self._size = -(-(slots + 2 * (nodes + model.horizon)) // 64) * 64
        layer: Any = partial(SlotLayer, self._size, self._index)
        self.cache = Cache(layer_class_to_replicate=layer)
        self._slots_L = torch.arange(self._size, device=self.device)
        self._rows_B = torch.arange(rows, device=self.device)
        # What one forward leaves to the next. lengths_B: tokens of the text in the cache; pending_B: the one behind.
        self._lengths_B = torch.ones(rows, dtype=torch.long, device=self.device)
        self._pending_B = torch.zeros(rows, dtype=torch.long, device=self.device)
        self._count = torch.zeros((), dtype=torch.long, device=self.device)
        self._hidden_BD = self._prefill([self._pending_B[:1]] * rows)[0].clone()
        self._out_BX: Tensor | None = None
        self._step()  # an eager one first: it makes the cache's tensors and tells the shape of the outcome
        self._replay = record(self._step, self.device)

    def _check_model(self) -> None:
        if isinstance(self.draft, str) and self.draft.startswith(LOOKUP):
            raise ValueError(
                f"captured forwards do not read the text that draft={self.draft!r} copies from; decode without them"
            )
        if self.model.training:  # a recording would keep its dropout
            raise ValueError("the model is in training mode, where dropout is random; call model.eval() first")
        window = self.model.attention_window
        if window is not None and window < self.slots:
            raise ValueError(
                f"some layers of this model attend to the last {window} tokens alone, captured forwards of "
                f"{self.slots} slots would show them more; pass slots={window}, or decode without captured forwards"
            )

    def check(
        self, model: DraftingModel, rows: int, sampling: Sampling, draft: str | Maker, nodes: int, longest: int
    ) -> None:
        """Raise ValueError for a decoding that these forwards were not made for. longest: tokens, prompt included."""
        if draft not in ("tree", "branched", "window", "path"):
            nodes = self.nodes
        if model is not self.model:
            raise ValueError("the forwards were captured for another model; make CapturedForwards for this one")
        made, asked = (self.rows, self.sampling, self.draft, self.nodes), (rows, sampling, draft, nodes)
        for what, ours, theirs in zip(("rows", "sampling", "draft", "nodes"), made, asked, strict=True):
            if ours != theirs:
                raise ValueError(
                    f"the forwards were captured for {what}={ours!r}, not {theirs!r}; make CapturedForwards for this"
                )
        if longest > self.slots:
            raise ValueError(
                f"prompt and new tokens are {longest}, the captured forwards have {self.slots} slots; make them with "
                f"slots={longest} or more"
            )

    @property
    def forwards_run(self) -> int:
        """Target forwards since the last `first`, it included; counted on the device, waits for it."""
        return int(self._count)

    @torch.inference_mode()
    def first(self, prompts: Sequence[Tensor]) -> Read:
        assert len(prompts) == self.rows
        self.cache.reset()  # a NaN that an earlier text left behind would count for more than the mask
        hidden_BD, lengths_B = self._prefill(prompts)
        drafter = make_drafter(self.draft, self.sampling, self.uniforms, self.nodes)
        acceptance = drafter.verify(self._target(hidden_BD[:, None]), nothing(self._pending_B))
        self._lengths_B.copy_(lengths_B)
        self._hidden_BD.copy_(hidden_BD)
        self._pending_B.copy_(acceptance.next_B.clamp(max=self.model.vocab_size - 1))
        self._count.fill_(1)
        return _copied(packed(acceptance))

    @torch.inference_mode()
    def next(self) -> Read:
        """It may be called before the last one is read. Rows that are done stay in it; theirs are not to be read."""
        if self._noise is not None:
            assert self.uniforms is not None, "the loop gives the rows' generators"
            self._noise.fill(self.uniforms)
        self._replay()
        assert self._out_BX is not None, "the first step made it"
        return _copied(self._out_BX)

    def _prefill(self, prompts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Hidden states (B, D) behind the prompts, whose tokens take the first slots, and the prompts' lengths (B,).

        Shorter prompts are padded behind their end; what is written there is written over before it counts.
        """
        lengths_B = torch.tensor([len(prompt) for prompt in prompts], device=self.device)
        window_BT = torch.nn.utils.rnn.pad_sequence([prompt.long() for prompt in prompts], batch_first=True)
        indices_BT = torch.arange(window_BT.shape[1], device=self.device).expand_as(window_BT)
        mask = (self._slots_L <= indices_BT.unsqueeze(-1)).unsqueeze(1)
        self._index.slots_BS = indices_BT
        with sdpa_kernel(KERNELS):
            hidden_BTD = self.model.hidden(window_BT, indices_BT, self.cache, mask)
        return hidden_BTD[self._rows_B, lengths_B - 1], lengths_B

    def _step(self) -> None:
        """One forward, from the state to the state: everything on the device, every shape fixed."""
        proposal = self.propose()
        window_BS = torch.cat([self._pending_B[:, None], proposal.tokens_BK], dim=1)
        hidden_BSD = self.run(window_BS, proposal)
        acceptance = self._drafter.verify(self._target(hidden_BSD), proposal)
        self._commit(acceptance, hidden_BSD)
        self._out_BX = packed(acceptance, self._out_BX)

    def propose(self) -> Proposal:
        """Drafts behind the pending token."""
        if self._noise is not None:
            self._noise.rewind()
        return propose(self.model, self._drafter, self._hidden_BD, self._pending_B, self._depth)

    def run(self, window_BS: Tensor, proposal: Proposal) -> Tensor:
        """Hidden states (B, S, D) of a window behind the text, which stays as long as it is."""
        steps_BS = self._slots_L[: window_BS.shape[1]].expand_as(window_BS)
        slots_BS = self._index.slots_BS = self._lengths_B[:, None] + steps_BS
        indices_BS = slots_BS if proposal.depth_BS is None else self._lengths_B[:, None] + proposal.depth_BS
        positions_BS = indices_BS.clamp(max=self.model.context - 1)
        behind_BL = self._slots_L - self._lengths_B[:, None]  # 0 at the pending token's slot
        if proposal.seen_BSS is None:
            seen_BSL = behind_BL[:, None] <= steps_BS[:, :, None]
        else:
            size = window_BS.shape[1]
            index_BSL = behind_BL.clamp(0, size - 1)[:, None].expand(-1, size, -1)
            inside_BSL = ((behind_BL >= 0) & (behind_BL < size))[:, None]
            seen_BSL = (behind_BL < 0)[:, None] | (inside_BSL & proposal.seen_BSS.gather(2, index_BSL))
        with sdpa_kernel(KERNELS):
            return self.model.hidden(window_BS, positions_BS, self.cache, seen_BSL.unsqueeze(1))

    def _commit(self, acceptance: Acceptance, hidden_BSD: Tensor) -> None:
        if acceptance.path_BJ is not None:
            self._move(acceptance.path_BJ)
        self._lengths_B.add_(acceptance.accepted_B).add_(1).clamp_(max=self._size - hidden_BSD.shape[1])
        self._hidden_BD.copy_(hidden_BSD[self._rows_B, last_accepted(acceptance)])
        torch.clamp(acceptance.next_B, max=self.model.vocab_size - 1, out=self._pending_B)
        self._count.add_(1)

    def _move(self, path_BJ: Tensor) -> None:
        """Keys and values of a tree's accepted path go to the slots right behind the pending token."""
        start_B1 = self._lengths_B[:, None]
        source_BJ = start_B1 + path_BJ
        target_BJ = start_B1 + 1 + torch.arange(path_BJ.shape[1], device=self.device)
        for layer in self.cache.layers:
            assert isinstance(layer, SlotLayer) and layer.keys is not None and layer.values is not None
            for held in (layer.keys, layer.values):
                shape = (-1, held.shape[1], -1, held.shape[3])
                moved = held.gather(2, source_BJ[:, None, :, None].expand(*shape))
                held.scatter_(2, target_BJ[:, None, :, None].expand(*shape), moved)


class Captures:
    """The captured forwards of a model, held for the next texts of the same kind; nothing off CUDA.

    One kind is held at a time. Weights that have moved or changed precision since are captured anew.
    """

    STEP = 256  # slots are made in multiples

    def __init__(self, model: Any, on: str = "cuda") -> None:
        self.model, self.on = model, on
        self.kind: tuple[Any, ...] = ()
        self.forwards: CapturedForwards | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy captures for itself."""
        return Captures, (self.model, self.on)

    def __call__(
        self, rows: int, longest: int, sampling: Sampling, draft: str = "chain", nodes: int = 8
    ) -> CapturedForwards | None:
        """Forwards for texts of at most `longest` tokens, prompt included; None where growing forwards are to be used,
        for lookup, or where the texts exceed the context, which the loop refuses."""
        weights = [*self.model.parameters(), *self.model.buffers()]
        window = self.model.attention_window
        most = self.model.context if window is None else min(window, self.model.context)
        if draft.startswith(LOOKUP) or weights[0].device.type != self.on or most < longest:
            return None
        kind = (rows, sampling, draft, nodes, *((each.data_ptr(), each.shape, each.dtype) for each in weights))
        if self.forwards is None or self.kind != kind or self.forwards.slots < longest:
            slots = min(-(-longest // self.STEP) * self.STEP, most)
            self.forwards = None  # the old ones' memory first
            self.forwards = CapturedForwards(self.model, rows, sampling, draft=draft, nodes=nodes, slots=slots)
            self.kind = kind
        return self.forwards


class _Noise:
    """Random numbers at fixed addresses, (B, count) for each call of a forward, in order; made by the first one."""

    def __init__(self, rows: int, device: torch.device) -> None:
        self.rows, self.device = rows, device
        self.held: list[Tensor] = []
        self.turn = 0

    def __call__(self, count: int) -> Tensor:
        if self.turn == len(self.held):
            self.held.append(torch.zeros(self.rows, count, dtype=torch.float64, device=self.device))
        self.turn += 1
        return self.held[self.turn - 1]

    def rewind(self) -> None:
        self.turn = 0

    def fill(self, uniforms: Uniforms) -> None:
        """The numbers of the next forward, drawn in the order in which it takes them."""
        for each in self.held:
            each.copy_(uniforms(each.shape[1]))


def record(step: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """`step` as a recorded CUDA graph, to be replayed on the tensors it used; on other devices `step` itself."""
    if device.type != "cuda":
        return step
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(WARM_UPS):
            step()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()

    def replay(keep: Callable[[], None] = step) -> None:
        """The graph reads the tensors that the step holds: they live as long as it does."""
        graph.replay()

    return replay


def _copied(packed_BX: Tensor) -> Read:
    """What the device writes to the host while it goes on."""
    if packed_BX.device.type != "cuda":
        return packed_BX.clone().tolist
    host_BX = torch.empty(packed_BX.shape, dtype=packed_BX.dtype, pin_memory=True)
    host_BX.copy_(packed_BX, non_blocking=True)
    event = torch.cuda.Event()
    event.record()

    def read() -> list[list[int]]:
        event.synchronize()
        rows: list[list[int]] = host_BX.tolist()
        return rows

    return read
