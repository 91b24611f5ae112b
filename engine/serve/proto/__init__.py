"""The wire of `serac.v1`: .proto files, the code generated from them, and the command that generates it."""
