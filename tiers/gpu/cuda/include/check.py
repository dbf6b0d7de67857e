"""check.py DIR compares cuda.h here with a genuine one in DIR.

It is one of CUDA 12, for instance from the Python package nvidia-cuda-runtime-cu12. Compared are
the value of every constant, the symbol and parameters of every call, the layout of every structure.
"""

import pathlib
import re
import subprocess
import sys
import tempfile

OURS = pathlib.Path(__file__).parent
HEADER = (OURS / "cuda.h").read_text()


def answers(include: pathlib.Path, tmp: pathlib.Path) -> str:
    """Compile a program of questions against a header and return what it prints."""
    ask = [f'printf("{c} %lld\\n", (long long){c});' for c in re.findall(r"\b(CU(?:DA)?_[A-Z0-9_]+) (?:= )?-?\d", HEADER)]
    for body, name in re.findall(r"typedef struct \{(.*?)\} (\w+);", HEADER, re.S):
        ask.append(f'printf("{name} %zu\\n", sizeof({name}));')
        ask += [f'printf("{name}.{f} %zu\\n", offsetof({name}, {f}));' for f in re.findall(r"(\w+)(?:\[\d+\])?[,;]", body) if name.startswith("CUDA")]
    ask += [f'puts("{call} " SYMBOL({call}));' for call in re.findall(r"^CUresult (\w+)\(", HEADER, re.M)]
    source = "#include <cuda.h>\n#include <stddef.h>\n#include <stdio.h>\n#define STRING(x) #x\n#define SYMBOL(x) STRING(x)\n"
    (tmp / "ask.c").write_text(source + "int main(void) {\n" + "\n".join(ask) + "\n}\n")
    subprocess.run(["cc", f"-I{include}", "-o", tmp / "ask", tmp / "ask.c"], check=True)
    return subprocess.run([tmp / "ask"], check=True, capture_output=True, text=True).stdout


def main() -> None:
    theirs = pathlib.Path(sys.argv[1])
    with tempfile.TemporaryDirectory() as folder:
        tmp = pathlib.Path(folder)
        # Declared again behind the genuine header, a prototype has to say the same.
        (tmp / "calls.c").write_text("#include <cuda.h>\n" + "\n".join(re.findall(r"^CUresult .*", HEADER, re.M)))
        subprocess.run(["cc", "-Wall", "-Werror", f"-I{theirs}", "-c", "-o", tmp / "calls.o", tmp / "calls.c"], check=True)
        ours, genuine = answers(OURS, tmp).splitlines(), answers(theirs, tmp).splitlines()
    for a, b in zip(ours, genuine, strict=True):
        if a != b:
            sys.exit(f"cuda.h says {a}, the genuine one {b}")
    print(f"{len(ours)} facts are the same")


if __name__ == "__main__":
    main()
