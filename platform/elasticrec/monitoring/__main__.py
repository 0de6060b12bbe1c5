"""`python -m elasticrec.monitoring`, in the project's folder: writes `deploy/monitoring` and the table of the docs."""

from pathlib import Path

from elasticrec.monitoring.files import documented, write

DOCUMENT = Path("docs/monitoring.md")


def main() -> None:
    write(Path("deploy/monitoring"))
    DOCUMENT.write_text(documented(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
