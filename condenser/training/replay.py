"""Passes as CUDA graphs."""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from condenser.data.collate import Fields
from condenser.training.passes import PassResult


class Replays:
    """Passes as CUDA graphs: captured once for each shape, then replayed on new inputs, at one launch each. Where one
    cannot be captured, passes are run without.

    Args:
        run: forward and backward of a pass; adds to ``gradients``, whose buffers stay.
    """

    def __init__(self, run: Callable[[Fields, Tensor, bool], PassResult], gradients: list[Tensor]):
        self.run, self.gradients, self.failed = run, gradients, False
        self.captured: dict[Any, tuple[Any, Fields, Tensor, PassResult]] = {}
        self.pool: Any = None  # memory that all graphs share: one is replayed at a time

    def __call__(self, inputs: Fields, scale: Tensor, score: bool) -> PassResult:
        shape = (score, *(value.shape if isinstance(value, Tensor) else value for value in inputs.values()))
        if shape not in self.captured and not self.failed:
            self.capture(shape, inputs, scale, score)
        if self.failed:
            return self.run(inputs, scale, score)
        graph, own, own_scale, (loss, shares, _) = self.captured[shape]
        torch._foreach_copy_(tensors(own), tensors(inputs))
        own_scale.copy_(scale)
        graph.replay()
        own_shares = {name: value.clone() for name, value in shares.items()}  # the next replay writes to `shares`
        return PassResult(loss.clone(), own_shares)

    def capture(self, shape: Any, inputs: Fields, scale: Tensor, score: bool) -> None:
        own = {name: value.clone() if isinstance(value, Tensor) else value for name, value in inputs.items()}
        own_scale, before = scale.clone(), [gradient.clone() for gradient in self.gradients]
        state, cached = torch.cuda.get_rng_state(), torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(False)  # else weights in half precision would stay what they are now
        stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        try:
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):  # what is compiled, tuned or allocated at first must be so before
                for _ in range(2):
                    self.run(own, own_scale, score)
            torch.cuda.current_stream().wait_stream(stream)
            # other threads, as the one that pins memory for the loader, go on allocating
            with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
                found = self.run(own, own_scale, score)
            self.captured[shape], self.pool = (graph, own, own_scale, found), self.pool or graph.pool()
        except RuntimeError as error:
            self.failed = True
            message = str(error).splitlines()[0]
            print(f"passes are not replayed as CUDA graphs (model.cuda_graphs): {message}", file=sys.stderr)
        finally:
            torch.set_autocast_cache_enabled(cached)
            torch._foreach_copy_(self.gradients, before)
            torch.cuda.set_rng_state(state)


def tensors(fields: Fields) -> list[Tensor]:
    return [value for value in fields.values() if isinstance(value, Tensor)]
