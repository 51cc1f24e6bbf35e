"""What training reads: recordings laid out as moshi-finetune wants them, as tokens of Moshi's language model.

From the disk upwards: ``manifest`` finds recordings and names what is wrong with them, ``text`` and ``codec`` make
tokens of them, ``shards`` keeps tokens on disk, ``corpus`` serves any segment of any source, ``order`` says which
segment comes when, ``dataset`` makes the batches of one rank.
"""
