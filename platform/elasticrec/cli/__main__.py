"""`python -m elasticrec.cli …` is `elasticrec …`."""

from elasticrec.cli.main import main

if __name__ == "__main__":
    main()
