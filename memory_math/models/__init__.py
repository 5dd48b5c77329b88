"""The models as they run, one file per family: each mirrors the forward pass of its original, call by call, on a tape of sizes."""
