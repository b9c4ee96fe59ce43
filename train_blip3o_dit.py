from blip3o_dit.cli.main import run_script

if __name__ == "__main__":
    raise SystemExit(run_script("train", "train_blip3o_dit.py"))
