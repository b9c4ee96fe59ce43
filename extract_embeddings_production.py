from blip3o_dit.cli.extract import main

if __name__ == "__main__":
    raise SystemExit(main())
