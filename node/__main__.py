"""`python -m node` is `metaswarm`."""

from node.cli import main

if __name__ == "__main__":
    main()
