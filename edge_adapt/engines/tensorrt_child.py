"""`python -m edge_adapt.engines.tensorrt_child GRAPH STAGED KEY [WORKSPACE_MB]`: builds one plan, and ends.

It is the first that the system kills when memory runs short, and it ends with the process that began it.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import signal
import sys
from pathlib import Path

import onnx

from edge_adapt.engines.building import DISK_FULL, REFUSED
from edge_adapt.engines.cache import PlanKey, sealed, write_staged
from edge_adapt.engines.tensorrt_build import RefusedError, build
from edge_adapt.errors import EngineError

FAILED = 1
SET_PARENT_DEATH_SIGNAL = 1


def main(graph: str, staged: str, key: str, workspace_mb: str | None = None) -> int:
    """Exit code; the reason is the last line printed."""
    _be_the_first_to_go()
    facts = json.loads(key)
    wanted = PlanKey(**{**facts, "flags": tuple(facts["flags"])})
    try:
        plan = build(
            onnx.load(graph),
            precision=wanted.precision,
            max_batch=wanted.max_batch,
            workspace_mb=int(workspace_mb) if workspace_mb else None,
            progress=_tell,
        )
        write_staged(Path(staged), sealed(plan, wanted))
    except RefusedError as error:
        print(error.what, flush=True)
        return REFUSED
    except EngineError as error:
        print(error.what, flush=True)
        return FAILED
    except OSError as error:
        print(f"the plan cannot be written: {error.strerror}", flush=True)
        return DISK_FULL if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else FAILED
    return 0


def _tell(phase: str, done: int, total: int) -> None:
    print(json.dumps({"phase": phase, "done": done, "total": total}), flush=True)


def _be_the_first_to_go() -> None:
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
