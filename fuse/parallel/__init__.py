"""Context parallelism: a sequence that lies on several ranks, a shard on each, attended to as a whole.

what a user says
    option    fuse.ContextParallel
    layout    which positions of the sequence lie on which rank
    shards    a batch as this rank's shard of it, and back
in graphs
    plan      what the op is told beside its spec
    op        fuse::context_attention
when it runs
    call      one call on this rank
    alike     whether all ranks make the same one
    needs     which keys the rows of a shard see at all, by the bounds of the mask
    exchange  rows of tensors between ranks, by torch.distributed
    gather    attention of a shard's queries with all the keys that they need at once
    ring      the same in parts, a rank's keys at a time, while the next are on their way
"""
