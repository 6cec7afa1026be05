"""BH routing in llama.cpp, by its public callback: GGUF models, no fork (docs/llama_cpp.md).

``route(Llama, model_path=..., calibration=..., experts_per_token=4)`` makes an ordinary ``llama_cpp.Llama``.
"""

from .loading import route
from .routing import LlamaRouting

__all__ = ["LlamaRouting", "route"]
