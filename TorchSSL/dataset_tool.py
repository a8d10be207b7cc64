"""Convert images to the ZIP or folder that EDM trains on; `--help` tells how."""
from shared.cli import run_main
from shared.dataset_tool import main

if __name__ == "__main__":
    run_main(main)
