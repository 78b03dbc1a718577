"""torchrun, except that it ends with the exit code of its workers: 75 must reach the scheduler, torchrun makes it 1.

The workers' first process on this machine writes its code into a file; torchrun itself keeps only that one has failed.
A crash leaves no code, and torchrun's own ending stands.

SLURM sends SIGUSR1 to every process of a job. torchrun would die of it, and so would a worker that is still importing;
one that ignored it would not learn of it. So it is blocked here, and workers inherit that: it waits until they take it.
"""

import os
import signal
import sys
from pathlib import Path
from tempfile import TemporaryDirectory


def run(arguments: list[str]) -> int:
    """Run torchrun; return the exit code that the workers left, if it has failed."""
    from torch.distributed.run import main  # starts threads, which must inherit what is blocked

    with TemporaryDirectory() as folder:
        file = Path(folder) / "code"
        os.environ["RAWLOOP_EXIT_CODE_FILE"] = str(file)
        try:
            main(arguments)
        except Exception as error:
            code = file.read_text() if file.exists() else "0"
            if code in ("0", "1"):
                raise
            print(f"torchrun: {type(error).__name__}; exit code {code} of the workers stands", file=sys.stderr)
            return int(code)
    return 0


def let_sigusr1_wait() -> None:
    """Block SIGUSR1 in this process and in those that it starts. Ignored, as the scripts leave it, it would be lost."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    signal.signal(signal.SIGUSR1, signal.SIG_DFL)


if __name__ == "__main__":
    let_sigusr1_wait()
    sys.exit(run(sys.argv[1:]))
