"""The origin of an artifact's bytes, beside its recipe: files, data, code, versions, and the machine."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import onnx_ir
import torch

from qconvert.errors import InputError
from qconvert.ir.batch import Batch
from qconvert.ir.model import Model
from qconvert.ir.template import Template
from qconvert.job import Job
from qconvert.plugin.host.distribution import Code, requirements
from qconvert.plugin.quantizer import Quantizer
from qconvert.plugin.range_estimator import RangeEstimator
from qconvert.plugin.tuner import BlockTuner
from qconvert.storage.digest import sha256, tensor_bytes

# The distributions whose version can change the output.
PACKAGES = (
    *("compressed-tensors", "numpy", "onnx", "onnx-ir", "onnxruntime", "onnxscript"),
    *("qconvert", "tokenizers", "torch", "transformers"),
)
# What makes a library compute with other instructions, or more coarsely, than it would by itself.
STEERING = (
    *("ATEN_CPU_CAPABILITY", "MKL_CBWR", "MKL_DEBUG_CPU_TYPE", "MKL_ENABLE_INSTRUCTIONS", "OPENBLAS_CORETYPE"),
    *("DNNL_DEFAULT_FPMATH_MODE", "DNNL_MAX_CPU_ISA", "ONEDNN_DEFAULT_FPMATH_MODE", "ONEDNN_MAX_CPU_ISA"),
    *("CUBLAS_WORKSPACE_CONFIG", "NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE"),
)


@dataclass(frozen=True, slots=True)
class Origin:
    """The state of everything that an artifact's bytes depend on beside its recipe: the manifest holds it, and a resumed run
    must have it in common with the run before.

    inputs: name -> hex sha256. The model's files have their own names, all else one with a kind and a colon before it
        (qconvert.ir.artifact.INPUT_KINDS), such as "calibration:text.txt".
    versions: name -> version, of Python and of distributions.
    machine: what decides in which order floats are added, and with how many digits.
    """

    inputs: Mapping[str, str]
    versions: Mapping[str, str]
    machine: Mapping[str, str | int]


def origin_of(job: Job) -> Origin:
    """Return what the bytes of a job's artifact depend on, beside its recipe."""
    unread = () if job.plan.calibrated else ("calibration",) if job.recipe.verify else ("calibration", "evaluation")
    inputs = {
        **{name: digest for name, digest in job.digests.items() if name.partition(":")[0] not in unread},
        **sample_digests(job.samples.calibration),
        **graph_digests(job.model, job.template),
        **option_digests(job.quantizer, "option"),
        **({} if job.tuner is None else option_digests(job.tuner, "tuner")),
        **({} if job.range_estimator is None else option_digests(job.range_estimator, "ranges")),
        **{f"code:{code.distribution.name}": code.digest for code in job.code},
    }
    return Origin(inputs, versions(job.code), machine(job.recipe.device))


def file_digests(files: Mapping[str, Path | bytes]) -> dict[str, str]:
    """Return the hex sha256 of each file's content by name. Raises InputError QC-WRITE-005 for a file that can't be read."""

    def digest(path: Path | bytes) -> str:
        try:
            return sha256(path)
        except OSError as error:
            raise InputError(
                "QC-WRITE-005", f"{error.filename} can't be read: {error.strerror}", hint="check the file"
            ) from error

    contents = tuple(dict.fromkeys(files.values()))  # one file may be there for two purposes
    with ThreadPoolExecutor(2) as pool:  # hashing leaves the GIL, and two saturate most disks
        found = dict(zip(contents, pool.map(digest, contents), strict=True))
    return {name: found[content] for name, content in files.items()}


def sample_digests(calibration: Sequence[Batch]) -> dict[str, str]:
    """Return one digest of the samples that calibrate, {} without any.

    It stands for text that comes with Python, for what a tokenizer makes of a file, and for examples.
    """
    digest = hashlib.sha256()
    for batch in calibration:
        for name, tensor in batch.items():
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor_bytes(tensor))
    return {"samples:calibration": digest.hexdigest()} if calibration else {}


def graph_digests(model: Model, template: Template) -> dict[str, str]:
    """Digest what a factory's module computes, whose code may lie in many files: part -> digest; {} for models of a library."""
    if model.task.takes_text:
        return {}
    return {f"graph:{part}": hashlib.sha256(_bare(graph, model)).hexdigest() for part, graph in template.graphs.items()}


def _bare(traced: onnx_ir.Model, model: Model) -> bytes:
    """A graph without what names the places of its code, and without parameters, which are digested as files are."""
    made = traced.clone()
    for name in model.parameter_shapes:
        made.graph.initializers.pop(name, None)
    made.metadata_props.clear()
    made.graph.metadata_props.clear()
    for node in made.graph.all_nodes():
        node.metadata_props.clear()
    content: bytes = onnx_ir.to_proto(made).SerializeToString(deterministic=True)
    return content


def option_digests(part: Quantizer | BlockTuner | RangeEstimator, kind: str) -> dict[str, str]:
    """Of the files that the options of a quantizer, a tuner or a range estimator name: those of type Path."""
    fields = dataclasses.fields(part)  # type: ignore[arg-type]
    options = {field.name: getattr(part, field.name) for field in fields}
    files = {f"{kind}:{name}": value for name, value in options.items() if isinstance(value, Path) and value.is_file()}
    return file_digests(files)


def versions(used: Iterable[Code]) -> dict[str, str]:
    """Return the versions of Python, of what qconvert computes with, and of the plugins that are used and what they need."""
    found = {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}
    for code in used:
        found |= {**requirements(code.distribution.name), code.distribution.name: code.distribution.version}
    return found


def machine(device: str) -> dict[str, str | int]:
    """Return the processor, how many threads share a product, and what a user has set for either.

    Measured with gptq on MiniLM: one thread or two, AVX2 or AVX-512 give other codes, all as good.
    """
    found: dict[str, str | int] = {
        "processor": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()} {_processor_name()}".strip(),
        "threads": torch.get_num_threads(),
        "precision": torch.get_float32_matmul_precision(),
        **{name: os.environ[name] for name in STEERING if name in os.environ},
    }
    if torch.device(device).type == "cuda":
        found["device"] = torch.cuda.get_device_name(device)
    return found


def _processor_name() -> str:
    """Return the name that Linux gives the processor; elsewhere the one that Python knows."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines() if info.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())
