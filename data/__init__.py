"""From recordings, laid out as moshi-finetune wants them, to batches of tokens of Moshi's language model.

From the disk upwards: ``audio_files``, ``audio_format`` and ``mp3`` read recordings, ``audio`` resamples, encodes and
decodes them; ``sources`` reads the data string of a config, ``manifest`` the manifests, ``problems`` says what is wrong
with single recordings; ``text`` and ``codec`` make tokens of them, ``shards`` keeps tokens on disk and ``encoding``
writes such folders; ``corpus`` serves any segment of any source, ``order`` says which segment comes when, ``dataset``
makes the batches of one rank.
"""
