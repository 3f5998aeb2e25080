"""Registers, spills and shared memory of the Triton kernels, compiled ahead of time for a GPU that need not be there.

python -m ssl_locat.benchmarks.kernels 90 bfloat16 64 [packed]     (compute capability, dtype, head dimension; several threes in a row) -> JSON
"""

import json
import re
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from ssl_locat.models import attention_triton as kernels

KERNELS = [kernels.forward_kernel, kernels.query_grad_kernel, kernels.key_grad_kernel]
POINTERS = {"bfloat16": "*bf16", "float16": "*fp16", "float32": "*fp32"}
IN_DTYPE = {"Q", "K", "V", "OUT", "DOUT", "DQ", "DK", "DV"}  # the other tensors are float32
IN_FLOAT32 = {"AX", "AY", "ALPHA", "LSE", "DELTA", "DAX", "DAY", "DALPHA"}


def compile_kernel(kernel: Any, capability: int, dtype: str, head_dim: int, packed: bool = False) -> dict:
    """Compile as a launch on timm's tensors would (pointers and strides divisible by 16), then ask ptxas what it takes. packed: for sequences laid
    end to end, each with its own grid."""
    options = kernels.launch_options(kernel, head_dim, getattr(torch, dtype)) | {"POOL": 1}
    signature, constants, attributes = {}, {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in options:
            signature[name], constants[(index,)] = "constexpr", options[name]
        elif name == "TABLE" and packed:
            signature[name] = "*i32"
        # None at launch, too: Triton then leaves the branch out
        elif name in ("KEPT", "TABLE"):
            signature[name], constants[(index,)] = "constexpr", None
        elif name in IN_DTYPE | IN_FLOAT32:
            signature[name] = POINTERS[dtype] if name in IN_DTYPE else "*fp32"
        else:
            signature[name] = "fp32" if name in ("scale", "clamp") else "i32"
        # Triton specialises on this at launch, and vector loads depend on it
        if name in IN_DTYPE | IN_FLOAT32 or name.endswith(("_b", "_h", "_t")):
            attributes[(index,)] = [["tt.divisibility", 16]]
    compiler_options = {name: options[name] for name in ("num_warps", "num_stages", "enable_fp_fusion")}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on defaults of the compiler's next version
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=compiler_options)
    with tempfile.TemporaryDirectory() as folder:
        ptx = Path(folder) / "kernel.ptx"
        ptx.write_text(compiled.asm["ptx"])
        # as the compiler chose it: 90 becomes sm_90a, which ptxas must be told alike
        (architecture,) = re.findall(r"\.target (\w+)", compiled.asm["ptx"])
        command = [get_ptxas(capability).path, "-v", f"--gpu-name={architecture}", str(ptx), "-o", f"{folder}/kernel.cubin"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return {
        "capability": capability,
        "dtype": dtype,
        "head_dim": head_dim,
        "kernel": kernel.__name__,
        "registers": int(re.findall(r"Used (\d+) registers", said)[0]),
        "spills": sum(int(n) for n in re.findall(r"(\d+) bytes spill", said)),
        "shared_bytes": compiled.metadata.shared,
    }


if __name__ == "__main__":
    # several in one process: importing torch and triton takes longer than compiling for one GPU
    given = [word for word in sys.argv[1:] if word != "packed"]
    cases = [(int(given[at]), given[at + 1], int(given[at + 2]), "packed" in sys.argv) for at in range(0, len(given), 3)]
    json.dump([compile_kernel(kernel, *case) for case in cases for kernel in KERNELS], sys.stdout)
