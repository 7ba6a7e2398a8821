"""Look for known vulnerabilities of the installed packages with pip-audit, in an environment of its own.

    python benchmarks/audit.py --out benchmarks/results/audit.json

pip-audit calls a list clean also where its service knows none of the packages (no network, a mirror): here a package that could not be
looked up is a failure, too, and so is a service that does not know an old vulnerability (Pillow 9.0.0, CVE-2022-22817).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path

CONTROL = "pillow==9.0.0"


def audit(python: Path, requirements: str) -> list[dict]:
    """What pip-audit says of each pinned package."""
    with tempfile.TemporaryDirectory() as folder:
        file, answer = Path(folder) / "requirements.txt", Path(folder) / "answer.json"
        file.write_text(requirements + "\n")
        command = [python, "-m", "pip_audit", "-r", file, "--no-deps", "--disable-pip", "-f", "json", "-o", answer]
        done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
        if not answer.is_file():
            sys.exit(f"pip-audit gave no answer: {done.stderr.strip().splitlines()[-1:]}")
        return json.loads(answer.read_text())["dependencies"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--venv", type=Path, default=Path(tempfile.gettempdir()) / "equiframe-audit")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    python = arguments.venv / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", arguments.venv], check=True)
        subprocess.run([python, "-m", "pip", "install", "-q", "pip-audit"], check=True)
    freeze = subprocess.run([sys.executable, "-m", "pip", "freeze"], check=True, capture_output=True, text=True).stdout
    pinned = [line for line in freeze.splitlines() if "==" in line and not line.startswith("-e")]
    found = audit(python, "\n".join(pinned))
    control = audit(python, CONTROL)[0]
    record = {
        "date": date.today().isoformat(), "packages": len(pinned), "installed": pinned,
        "looked_up": sum("skip_reason" not in package for package in found),
        "vulnerable": [package for package in found if package.get("vulns")],
        "control_was_found": bool(control.get("vulns")),
    }  # fmt: skip
    if arguments.out:
        arguments.out.write_text(json.dumps(record, indent=1) + "\n")
    print({name: value for name, value in record.items() if name != "installed"})
    if record["looked_up"] < len(pinned) or not record["control_was_found"]:
        sys.exit("not checked: the service does not know these packages (is there a network?)")
    sys.exit(bool(record["vulnerable"]))


if __name__ == "__main__":
    main()
