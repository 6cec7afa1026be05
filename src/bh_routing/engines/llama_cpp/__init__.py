"""BH routing in llama.cpp, by its public callback: GGUF models, no fork (docs/llama_cpp.md).

``route(Llama, model_path=..., calibration=..., experts_per_token=4)`` makes an ordinary ``llama_cpp.Llama``;
``calibrate(Llama, model_path=..., texts=...)`` makes a calibration where there is only the GGUF file.
"""

from .calibrating import calibrate
from .loading import route
from .routing import LlamaRouting

__all__ = ["LlamaRouting", "calibrate", "route"]
