"""The functions of other libraries, with their names, signatures and semantics, by rope_cupy.

A program changes one import and nothing else. No module here imports the library that it replaces.

| import from | instead of |
| --- | --- |
| `rope_cupy.compat.flash_attn` | `flash_attn.layers.rotary`, `flash_attn.ops.triton.rotary` |
| `rope_cupy.compat.quack` | `quack.rotary` |
| `rope_cupy.compat.flashinfer` | `flashinfer`, `flashinfer.rope` |
| `rope_cupy.compat.vllm` | `vllm._custom_ops`, and a class for vLLM's registry out of tree |
| `rope_cupy.compat.sglang` | `sgl_kernel`, `sglang.kernels.ops`, `sglang.jit_kernel` |
| `rope_cupy.compat.liger` | `liger_kernel.transformers.rope`, `.qwen2vl_mrope`, `.llama4_rope` |
| `rope_cupy.compat.transformer_engine` | `transformer_engine.pytorch.attention.rope` |
| `rope_cupy.compat.apex` | `fused_rotary_positional_embedding` |
| `rope_cupy.compat.comfy_kitchen` | `comfy_kitchen` |
| `rope_cupy.compat.torchtitan` | `torchtitan.models.common.rope` |
| `rope_cupy.compat.timm` | `timm.layers` |

The docstring of each module says what differs. All functions take PyTorch tensors, on the CPU and
on a GPU. Functions without modules or gradients of PyTorch take CuPy arrays too.
"""
