"""The daemon: connections, sessions, options, and the Twisted service.

From the command line: `commandline` and `options` make settings of it, `tap` runs the `daemon`,
a service made of `parts` around what all sessions share (`shared`): with `builder`, `supply` and
`discovering`.  `storemount` is for stores that are read-only to others.

From a client: `listening` has the sockets and `listener` accepts, if `admission` has no objection;
`hub` watches many connections.  A `connection` reads requests and sends replies, under a
`contract` with the `session` that gives them their meaning; `hangup` and `answers` serve it.
`reception` begins sessions; `clientoptions` and `clientlog` are what a client chose and reads.

Requests: `adding`, `archives`, `building`, `changes`, `collecting`, `optimising`, `queries`,
`substituting`, `verifying` with `repairing`; `sweep` for those that look at the whole store,
`settling` for replies that wait for the disk.

To the end: `drain` waits for what is at work, `notify` tells the service manager.
"""
