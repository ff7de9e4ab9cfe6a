"""An environment with other versions of a few packages, which sees everything else in the one that this runs in.

    .venv/bin/python .ci/second_environment.py .venv-triton36 triton==3.6.0 numpy==2.3.5

torch alone is too large to install twice. The packages are installed without what they require: that is in the first.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import venv
from pathlib import Path


def main(folder: Path, *packages: str) -> None:
    venv.create(folder, clear=True, with_pip=False)
    python = folder / "bin" / "python"
    subprocess.run([sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", *packages], check=True)
    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    own = Path(subprocess.run([python, "-c", ask], capture_output=True, text=True, check=True).stdout.strip())
    # Not a line with the folder alone: addsitedir also reads the .pth files there, through which kvkern is found.
    first = sysconfig.get_path("purelib")
    (own / "first_environment.pth").write_text(f"import site; site.addsitedir({first!r})\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
