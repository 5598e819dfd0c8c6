"""Whether a run fits into the memory that there is, said before it begins."""

from __future__ import annotations

from collections.abc import Mapping

from qconvert.errors import ResourceError
from qconvert.ir.model import Model
from qconvert.report.wording import byte_size
from qconvert.supervision.memory import shortage

# Of an estimated peak: estimates are off by up to a fifth, and what might fit is not refused.
SURE_SHARE = 0.8
# Verification has a process of its own, beside the one that waits for it.
PROCESSES = {"verify": 2}
HELP = {
    "trace": "free memory, or convert on a larger machine",
    "quantize": "free memory, take fewer calibration samples or a quantizer without data, or convert on a larger machine",
    "verify": "free memory, or take --no-verify here and run qconvert verify on a larger machine",
}


def require_room(peaks: Mapping[str, int], model: Model) -> None:
    """Raise ResourceError QC-MEMORY-003 for the first stage that takes more memory than there is.

    peaks: as Plan has them.
    """
    files = 0 if model.folder is None else model.source_bytes
    for stage, nbytes in peaks.items():
        short = shortage(int(SURE_SHARE * nbytes), files, PROCESSES.get(stage, 1))
        if short is not None:
            raise ResourceError(
                "QC-MEMORY-003",
                f"the stage {stage!r} takes about {byte_size(nbytes)} of memory, and there are "
                f"{byte_size(short.free)}, by the limit of {short.owner}",
                hint=HELP[stage],
            )
