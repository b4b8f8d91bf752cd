"""ONNX Runtime on an NVIDIA GPU, by its CUDA or its TensorRT provider: the second way to the GPU, same protocol.

Weights cannot be edited in a provider's memory, so ports are graph inputs. A provider that is not really used is an
error: ONNX Runtime itself would fall back to the CPU without a word.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import onnx
import onnxruntime as ort
from numpy.typing import NDArray

from edge_adapt.bundle import Bundle
from edge_adapt.engines.cache import default_folder
from edge_adapt.engines.onnxruntime import make_session
from edge_adapt.engines.ported_engine import PortedEngine
from edge_adapt.engines.tensorrt_build import has_driver
from edge_adapt.errors import EngineError

Array = NDArray[Any]


class ProviderSession:
    """One session of one provider."""

    def __init__(
        self, graph: onnx.ModelProto, provider: str, threads: int, options: Mapping[str, str] | None = None
    ) -> None:
        """Raises: EngineError if the graph is refused, or the provider would not be used."""
        self._session = make_session(graph, threads, provider, provider_options=options)
        self._inputs = {info.name for info in self._session.get_inputs()}

    def run(self, feeds: Mapping[str, Array]) -> list[Array]:
        try:
            made: list[Array] = self._session.run(None, {name: feeds[name] for name in feeds.keys() & self._inputs})
        except Exception as error:  # ONNX Runtime's exceptions have no common base
            raise EngineError(
                f"ONNX Runtime failed: {str(error).splitlines()[0]}", remedy="use the onnxruntime engine"
            ) from error
        return made

    def close(self) -> None:
        """Memory goes with the object."""


class ProviderEngine(PortedEngine):
    """Ports are fed with every call. Subclasses name the provider."""

    provider: ClassVar[str]

    def __init__(self, bundle: Bundle, *, threads: int = 1) -> None:
        """Raises: EngineError if the provider cannot run here, in one sentence."""
        reason = self.probe()
        if reason is not None:
            raise EngineError(f"{self.provider} cannot run here: {reason}", remedy="use the onnxruntime engine")
        self._threads = threads
        super().__init__(bundle)

    @classmethod
    def probe(cls) -> str | None:
        if cls.provider not in ort.get_available_providers():
            return f"onnxruntime {ort.__version__} was built without it; install onnxruntime-gpu, or the board's build"
        return None if has_driver() else "no CUDA driver answers"

    @property
    def description(self) -> str:
        return f"onnxruntime {ort.__version__}, {self.provider}, ports are graph inputs"

    def _session(self, graph: onnx.ModelProto) -> ProviderSession:
        return ProviderSession(graph, self.provider, self._threads, self._options())

    def _options(self) -> dict[str, str]:
        return {}


class CudaProviderEngine(ProviderEngine):
    name: ClassVar[str] = "onnxruntime_cuda"
    provider: ClassVar[str] = "CUDAExecutionProvider"

    def _options(self) -> dict[str, str]:
        return {"use_tf32": "0"}


class TensorRTProviderEngine(ProviderEngine):
    """Builds its engines while the first frames wait, and keeps them; the `tensorrt` engine does not make them wait."""

    name: ClassVar[str] = "onnxruntime_tensorrt"
    provider: ClassVar[str] = "TensorrtExecutionProvider"

    def _options(self) -> dict[str, str]:
        folder = default_folder() / "onnxruntime"
        folder.mkdir(parents=True, exist_ok=True)
        return {"trt_engine_cache_enable": "1", "trt_engine_cache_path": str(folder)}
