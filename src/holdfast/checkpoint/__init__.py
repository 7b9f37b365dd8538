"""L2: tree → snapshot → chunk → write → commit → read → retain.

The way of the data, one file per station:

    tree.py      a state tree becomes a typed JSON document and a list of named arrays
    arrays.py    what an array is here: dtype, global shape, offsets; adapters for numpy, torch (torch_arrays.py) and torch's
                 sharded tensors (dtensors.py)
    shares.py    which rank writes which part of which array
    regions.py   rectangles of arrays, as arithmetic
    staging.py   shared memory under a hard cap, where snapshots live
    snapshot.py  a consistent copy of the arrays at a step boundary
    write.py     chunks, block hashes, deduplication, objects (pack.py), a part for each rank, the root; durable before anything
                 names them
    known.py     which chunks the store holds already
    record.py    what the run is, written once
    heads.py     numbered heads: claim, commit, fencing
    commit.py    one checkpoint after the other: write, name it in a head, retain, sweep
    saver.py     the background thread that turns the newest snapshot into a checkpoint
    request.py   what is asked of the saver, and what it tells of the outcome
    threads.py   threads that hash and send, and never keep a process from ending
    read.py      restore: verified, straight into memory, falling back when bytes do not verify
    assemble.py  the parts of all ranks as whole arrays
    targets.py   from what is wanted in memory to the blocks that are fetched
    retain.py    which checkpoints stay, what is condemned, what is swept
    format.py    the bytes of roots, parts, heads and pins
    runs/        what people do to a run from outside: look, verify, roll back, fork, remove
    exchange/    other tools' files: safetensors, torch, DCP
"""
