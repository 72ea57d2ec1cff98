"""Graphs beside one another."""

from __future__ import annotations

import pytest
import torch

from fastmetro.cuda_graphs import capture, warm_up

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU"),
]


class Products:
    """A long chain of products whose sums are so long that cuBLAS shares each one out, and adds up in its workspace."""

    def __init__(self, device: torch.device, seed: int, scale: float) -> None:
        made = torch.Generator(device).manual_seed(seed)
        self.left = scale * torch.randn(64, 65536, device=device, generator=made)
        self.right = torch.randn(65536, 64, device=device, generator=made)

    def __call__(self) -> list[torch.Tensor]:
        return [self.left @ self.right for _ in range(64)]


@pytest.mark.parametrize("index", range(max(torch.cuda.device_count(), 1)))
def test_graphs_that_run_at_once_do_not_disturb_each_other(index: int) -> None:
    device = torch.device("cuda", index)
    with torch.cuda.device(device):
        works = [Products(device, 0, 1.0), Products(device, 1, 1000.0)]
        graphs = []
        for work in works:
            warm_up(work, device)
            graphs.append(capture(work, device))
        expected = [work.left.double() @ work.right.double() for work in works]
        streams = [torch.cuda.Stream(device) for _ in works]
        for _ in range(20):
            for (graph, products), stream in zip(graphs, streams, strict=True):
                stream.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(stream):
                    for product in products:
                        product.fill_(float("nan"))
                    graph.replay()
            torch.cuda.synchronize()
            for (_, products), wanted in zip(graphs, expected, strict=True):
                for product in products:
                    difference = torch.linalg.norm(product.double() - wanted) / torch.linalg.norm(wanted)
                    assert difference < 1e-3  # TensorFloat-32 and another order of sums; a mixture would be off by 1
