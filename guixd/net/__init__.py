"""The network side: what is fetched by a helper process without the daemon's privileges.

The daemon's side: `client` asks the fetcher for what `requests` describe, `receiving` takes a body
from its pipe.  `narinfos` looks substitutes up for all clients, keeps answers in `cachefiles`,
and has them checked by `verdicts` and `judging`; `places` says where the archive is.

The fetcher: `fetcher` is the process, `transfers` fetches one body (`http1`, `ftp`, `files`),
`lookups` many small ones; `connections` are kept, `endpoints` and `proxies` lead to servers,
`reach` says which are too near, `codecs` undo compression, `sinks` write to the pipe.

Servers of the local network: `discovery` starts the `browser`; `announced` says whom it believes.

Helper processes: `spawning` starts them, `confinement` takes their power, `channel` has packets
for them, `helpers` notices their end.
"""
