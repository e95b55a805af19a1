"""One target forward: draft behind the pending token, run the model over the window, accept; then commit.

`GrowingForwards` do it with a cache that grows and rows that leave when they are done. `captured.CapturedForwards` do
the same with tensors of fixed shapes, so that a GPU can replay a forward as one recorded graph.

Letters: B rows, S = K+1 positions of a window, K drafts, J longest path through them, T tokens of a prompt, V
vocabulary, D width, X numbers of a row.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from cpdlm.decoding.cache import Text
from cpdlm.decoding.drafters import Acceptance, Uniforms
from cpdlm.decoding.drafting import Drafting
from cpdlm.decoding.model import DraftingModel
from cpdlm.decoding.proposals import Proposal, nothing

# What a target forward says of each row: how many drafts were accepted, the drafts (those behind the accepted ones are
# not to be read), the token after the accepted ones (V: the target was no distribution). The call waits for the device.
Read = Callable[[], list[list[int]]]


def last_accepted(acceptance: Acceptance) -> Tensor:
    """(B,) window position of the last accepted token: the pending one (0) where no draft was accepted."""
    path_BJ = acceptance.path_BJ
    if path_BJ is None:
        return acceptance.accepted_B
    before_BJ = torch.nn.functional.pad(path_BJ, (1, 0))
    return before_BJ.gather(1, acceptance.accepted_B.unsqueeze(1)).squeeze(1)


def packed(acceptance: Acceptance, out_BX: Tensor | None = None) -> Tensor:
    """(B, J+2): accepted, tokens, next; into `out_BX` where it is given."""
    parts = [acceptance.accepted_B[:, None], acceptance.tokens_BJ, acceptance.next_B[:, None]]
    return torch.cat(parts, dim=1, out=out_BX)


class GrowingForwards:
    """Target forwards through a cache that grows; shapes follow the texts.

    process: what changes the target's scores (B, S, V) given the proposal, or None. timer: as in `loop.Options`.
    """

    def __init__(
        self,
        model: DraftingModel,
        drafting: Drafting,
        uniforms: Uniforms | None,
        text: Text,
        process: Callable[[Tensor, Proposal], Tensor] | None,
        timer: Callable[[str], None],
    ) -> None:
        self.model, self.drafting, self.uniforms, self.text = model, drafting, uniforms, text
        self.process, self.timer = process, timer

    def first(self, prompts: Sequence[Tensor]) -> Read:
        """The forward over the prompts, (T,) ids each; it has no drafts."""
        self.hidden_BSD = self.text.prefill(prompts)
        return self._accept(nothing(prompts[0].new_zeros(len(prompts))))

    def next(self, room: int) -> Read:
        """room: the most drafts of use."""
        proposal = self.drafting.propose(self.hidden_BD, self.pending_B, room)
        if proposal.tokens_BK.shape[1]:
            self.timer("draft")
        window_BS = torch.cat([self.pending_B[:, None], proposal.tokens_BK.clamp(min=0)], dim=1)
        self.hidden_BSD = self.text.run(window_BS, proposal.depth_BS, proposal.seen_BSS)
        self.timer("trunk")
        return self._accept(proposal)

    def _accept(self, proposal: Proposal) -> Read:
        greedy = self.uniforms is None
        target_BSV = (self.model.target_scores if greedy else self.model.target_log_probs)(self.hidden_BSD)
        if self.process is not None:
            target_BSV = self.process(target_BSV, proposal)
        self.acceptance = self.drafting.drafter.verify(target_BSV, proposal)
        return packed(self.acceptance).tolist

    def commit(self, emitted: Sequence[Sequence[int]], going: Sequence[int]) -> None:
        """emitted: per row of the last forward, the drafts that its text keeps and the token after them. going: the
        rows that go on."""
        accepted = [len(tokens) - 1 for tokens in emitted]
        self.text.commit(accepted, self.acceptance.path_BJ)
        self.drafting.tell(emitted)
        if len(accepted) == 1 and self.acceptance.path_BJ is None:
            self.hidden_BD = self.hidden_BSD[:, accepted[0]]
        else:
            rows_B = torch.arange(len(accepted), device=self.hidden_BSD.device)
            self.hidden_BD = self.hidden_BSD[rows_B, last_accepted(self.acceptance)]
        self.pending_B = self.acceptance.next_B
        if len(going) < len(accepted):
            self.text.select(going)
            self.drafting.select(going)
            self.hidden_BD, self.pending_B = self.hidden_BD[going], self.pending_B[going]
            if self.uniforms is not None:
                self.uniforms.select(going)
