"""That this file is here puts its folder on sys.path, so that the tests below it find the builders beside it."""
