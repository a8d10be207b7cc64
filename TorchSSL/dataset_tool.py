"""Convert images to the ZIP or folder that EDM trains on: EDM/dataset_tool.py, also from this folder."""
from EDM.dataset_tool import main
from shared.cli import run_main

if __name__ == "__main__":
    run_main(main)
