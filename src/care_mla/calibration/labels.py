"""Labels drawn from the model's own prediction, and the gradient of the loss that they make: the true Fisher, not the empirical one."""

from __future__ import annotations

import torch
from torch import Tensor


def label_variates(num_windows: int, seqlen: int, seed: int) -> Tensor:
    """A uniform variate for every position, [windows, seqlen]: each window has a generator of its own, so that its labels are the same in any batch."""
    seeds = torch.randint(2**31, (num_windows,), generator=torch.Generator().manual_seed(seed))
    return torch.stack([torch.rand(seqlen, generator=torch.Generator().manual_seed(int(window))) for window in seeds])


def draw_labels(probabilities: Tensor, variates: Tensor, block: int = 256) -> Tensor:
    """One label per row of [tokens, vocabulary], as [tokens, 1].

    By inversion, in two steps: first the block of the vocabulary, then the label in it. torch.multinomial would draw a
    variate for every entry, and one running sum over the whole vocabulary costs several times the blocks' sums.

    Args:
        variates: [tokens], uniform in [0, 1).
    """
    tokens, vocabulary = probabilities.shape
    missing = -vocabulary % block
    padded = torch.nn.functional.pad(probabilities, (0, missing)) if missing else probabilities
    blocks = padded.view(tokens, -1, block)
    before = blocks.sum(-1).cumsum(-1)  # [tokens, blocks]
    mass = variates[:, None].to(probabilities.device) * before[:, -1:]
    chosen = torch.searchsorted(before, mass).clamp_max(before.shape[1] - 1)
    mass = mass - torch.where(chosen > 0, before.gather(1, (chosen - 1).clamp_min(0)), 0.0)
    within = blocks[torch.arange(tokens, device=chosen.device), chosen[:, 0]].cumsum(-1)  # [tokens, block]
    # Rounding may leave the mass beyond the block's last entry with any: the last label that has some is taken.
    label = torch.searchsorted(within, torch.minimum(mass, within[:, -1:]))
    return (chosen * block + label).clamp_max(vocabulary - 1)


def sampled_gradient(logits: Tensor, counted: Tensor, variates: Tensor) -> Tensor:
    """Gradient at the logits [batch, seqlen, vocabulary] of the summed cross entropy against labels drawn from the model's own prediction.

    Softmax minus one-hot, written down: autograd would hold two more tensors of that size and read them again. Labels from
    the model make it the true Fisher; those of the text, the empirical one.

    Args:
        counted: [batch, seqlen], 0 where nothing is predicted.
        variates: [batch, seqlen], see `label_variates`.
    """
    probabilities = logits.detach().float().softmax(-1).flatten(0, 1)
    labels = draw_labels(probabilities, variates.flatten())
    gradient = probabilities.scatter_add_(1, labels, torch.full_like(labels, -1.0, dtype=probabilities.dtype))
    return gradient.mul_(counted.flatten()[:, None]).view_as(logits).to(logits.dtype)
