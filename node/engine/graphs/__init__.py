"""A span's matrices as ONNX graphs, whatever its package's format: written here, and calculated by onnxruntime."""
