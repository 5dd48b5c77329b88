"""The commands of `python -m prompt_tuning_lab`, a file each: add_options(parser), and run(options), which prints the result to stdout.

What a command needs is imported when it runs, so that --help comes at once.
"""
