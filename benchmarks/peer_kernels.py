"""bitsandbytes' products and conversions, to be timed beside ours (benchmarks/kernels.py)."""

from collections.abc import Callable
from typing import Any

import numpy as np


class Peer:
    """bitsandbytes on the same weights; on a GPU its calls are recorded once as a CUDA graph, which
    is started `starts` times before it is waited for."""

    def __init__(
        self, dense: list[Any], device: str, starts: int, torch: Any, functional: Any
    ) -> None:
        self.torch, self.functional, self.device = torch, functional, device
        self.starts = starts
        self.dtype = torch.float32 if device == "cpu" else torch.bfloat16
        self.dense = [
            torch.from_numpy(np.array(w.T, np.float32)).to(device, self.dtype) for w in dense
        ]
        self.packed = [self.quantize(w, True) for w in self.dense]

    @classmethod
    def of(cls, dense: list[Any], platform: str, starts: int) -> "Peer | None":
        try:
            import bitsandbytes.functional as functional
            import torch
        except ImportError:
            return None
        device = {"cpu": "cpu", "gpu": "cuda"}.get(platform)
        if device is None or (device == "cuda" and not torch.cuda.is_available()):
            return None
        return cls(dense, device, starts, torch, functional)

    def quantize(self, w: Any, double: bool) -> Any:
        return self.functional.quantize_4bit(
            w, blocksize=64, quant_type="nf4", compress_statistics=double
        )

    def product(self, rows: int, transposed: bool) -> Callable[[], None]:
        from bitsandbytes import matmul_4bit

        width = self.dense[0].shape[0 if transposed else 1]
        x = self.torch.randn(rows, width, dtype=self.dtype, device=self.device)

        def run() -> None:
            for packed, state in self.packed:
                if transposed:  # what its backward does
                    x @ self.functional.dequantize_4bit(packed, state).to(x.dtype)
                else:
                    matmul_4bit(x, packed.t(), quant_state=state)

        return self.recorded(run)

    def conversion(self, kernel: str) -> Callable[[], None]:
        single = [self.quantize(w, False) for w in self.dense]

        def run() -> None:
            for w, (packed, state) in zip(self.dense, single, strict=True):
                if kernel == "quantize":
                    self.quantize(w, False)
                else:
                    self.functional.dequantize_4bit(packed, state)

        # Quantizing copies its code book to the device at every call, which no graph can hold.
        return self.recorded(run) if kernel == "dequantize" else self.synchronized(run)

    def synchronized(self, run: Callable[[], None]) -> Callable[[], None]:
        def plainly() -> None:
            with self.torch.no_grad():
                for _ in range(self.starts):
                    run()
            if self.device != "cpu":
                self.torch.cuda.synchronize()

        return plainly

    def recorded(self, run: Callable[[], None]) -> Callable[[], None]:
        def on_cpu() -> None:
            with self.torch.no_grad():
                run()

        if self.device == "cpu":
            return on_cpu
        on_cpu()  # compiles and allocates what a graph must not
        graph = self.torch.cuda.CUDAGraph()
        with self.torch.no_grad(), self.torch.cuda.graph(graph):
            run()

        def replay() -> None:
            for _ in range(self.starts):
                graph.replay()
            self.torch.cuda.synchronize()

        return replay
