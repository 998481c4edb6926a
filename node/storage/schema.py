"""The tables, as numbered migrations. A released migration is never edited: a later one changes its tables."""

from typing import Final

MIGRATIONS: Final[tuple[tuple[str, ...], ...]] = (
    (
        # `bucket` is the hour of issue. The index covers queries for the ids of a bucket and their observers.
        """
        CREATE TABLE observations (
            number INTEGER PRIMARY KEY,
            id BLOB NOT NULL UNIQUE,
            bucket INTEGER NOT NULL,
            observer TEXT NOT NULL,
            envelope BLOB NOT NULL
        )
        """,
        "CREATE INDEX observations_by_bucket ON observations (bucket, id, observer)",
        # Triggers maintain both tables, whichever process writes. A bucket's revision grows with every change, and its
        # row stays when it is empty, so that a digest computed at one revision is valid as long as that is current.
        """
        CREATE TABLE buckets (
            bucket INTEGER PRIMARY KEY,
            count INTEGER NOT NULL,
            revision INTEGER NOT NULL
        )
        """,
        """
        CREATE TABLE shares (
            bucket INTEGER NOT NULL,
            observer TEXT NOT NULL,
            count INTEGER NOT NULL,
            PRIMARY KEY (bucket, observer)
        ) WITHOUT ROWID
        """,
        """
        CREATE TRIGGER observation_added AFTER INSERT ON observations BEGIN
            INSERT INTO buckets VALUES (new.bucket, 1, 1)
                ON CONFLICT (bucket) DO UPDATE SET count = count + 1, revision = revision + 1;
            INSERT INTO shares VALUES (new.bucket, new.observer, 1)
                ON CONFLICT (bucket, observer) DO UPDATE SET count = count + 1;
        END
        """,
        """
        CREATE TRIGGER observation_dropped AFTER DELETE ON observations BEGIN
            UPDATE buckets SET count = count - 1, revision = revision + 1 WHERE bucket = old.bucket;
            UPDATE shares SET count = count - 1 WHERE bucket = old.bucket AND observer = old.observer;
            DELETE FROM shares WHERE bucket = old.bucket AND observer = old.observer AND count = 0;
        END
        """,
        # `multiaddrs` is a JSON array.
        """
        CREATE TABLE peers (
            peer TEXT PRIMARY KEY,
            multiaddrs TEXT NOT NULL,
            last_seen_s INTEGER NOT NULL
        )
        """,
        "CREATE INDEX peers_by_last_seen ON peers (last_seen_s)",
    ),
    (
        # Records that this node signed, so that it never equivocates; and proofs of equivocation by others.
        """
        CREATE TABLE consensus_records (
            id BLOB PRIMARY KEY,
            chain BLOB NOT NULL,
            epoch INTEGER NOT NULL,
            envelope BLOB NOT NULL
        ) WITHOUT ROWID
        """,
        "CREATE INDEX consensus_records_by_epoch ON consensus_records (chain, epoch)",
        # The canonical branch from the genesis on, for newcomers to verify. `signatures`: envelopes, see the code.
        """
        CREATE TABLE consensus_statements (
            chain BLOB NOT NULL,
            epoch INTEGER NOT NULL,
            id BLOB NOT NULL,
            envelope BLOB NOT NULL,
            signatures BLOB NOT NULL,
            PRIMARY KEY (chain, epoch)
        )
        """,
        "CREATE INDEX consensus_statements_by_id ON consensus_statements (id)",
        # The state after the last statement of that branch, and the last observation that our commits named.
        """
        CREATE TABLE consensus_states (
            chain BLOB PRIMARY KEY,
            statement BLOB NOT NULL,
            state BLOB NOT NULL
        )
        """,
        "CREATE TABLE consensus_named (chain BLOB PRIMARY KEY, number INTEGER NOT NULL)",
    ),
    (
        # Results of this node's adoption trials, by task bucket; `software`: the versions that were measured.
        """
        CREATE TABLE standings (
            kind TEXT NOT NULL,
            method TEXT NOT NULL,
            log_ratio REAL NOT NULL,
            tried_at_s INTEGER NOT NULL,
            software TEXT NOT NULL,
            PRIMARY KEY (kind, method)
        ) WITHOUT ROWID
        """,
    ),
    (
        # An observation counts towards the bounds in steps of 2 KiB, at every peer alike. So those of routes of up to
        # five stages and the smallest possible ones count the same: a flood of small ones does not displace them.
        """
        ALTER TABLE observations ADD COLUMN counted_bytes INTEGER AS ((length(envelope) + 2047) / 2048 * 2048)
        """,
        "ALTER TABLE buckets ADD COLUMN bytes INTEGER NOT NULL DEFAULT 0",
        "ALTER TABLE shares ADD COLUMN bytes INTEGER NOT NULL DEFAULT 0",
        "CREATE INDEX observations_by_size ON observations (bucket, counted_bytes, id, observer)",
        """
        UPDATE shares SET bytes = found.bytes FROM (
            SELECT bucket, observer, sum(counted_bytes) AS bytes FROM observations GROUP BY bucket, observer
        ) AS found WHERE shares.bucket = found.bucket AND shares.observer = found.observer
        """,
        "UPDATE buckets SET bytes = (SELECT ifnull(sum(bytes), 0) FROM shares WHERE shares.bucket = buckets.bucket)",
        "DROP TRIGGER observation_added",
        "DROP TRIGGER observation_dropped",
        """
        CREATE TRIGGER observation_added AFTER INSERT ON observations BEGIN
            INSERT INTO buckets (bucket, count, revision, bytes) VALUES (new.bucket, 1, 1, new.counted_bytes)
                ON CONFLICT (bucket) DO UPDATE
                SET count = count + 1, revision = revision + 1, bytes = bytes + excluded.bytes;
            INSERT INTO shares (bucket, observer, count, bytes)
                VALUES (new.bucket, new.observer, 1, new.counted_bytes)
                ON CONFLICT (bucket, observer) DO UPDATE SET count = count + 1, bytes = bytes + excluded.bytes;
        END
        """,
        """
        CREATE TRIGGER observation_dropped AFTER DELETE ON observations BEGIN
            UPDATE buckets SET count = count - 1, revision = revision + 1, bytes = bytes - old.counted_bytes
                WHERE bucket = old.bucket;
            UPDATE shares SET count = count - 1, bytes = bytes - old.counted_bytes
                WHERE bucket = old.bucket AND observer = old.observer;
            DELETE FROM shares WHERE bucket = old.bucket AND observer = old.observer AND count = 0;
        END
        """,
    ),
    (
        # Ranges of epochs of which our messages were deleted, so that they are not signed again with a clock set back.
        """
        CREATE TABLE consensus_closed (
            chain BLOB NOT NULL,
            first INTEGER NOT NULL,
            last INTEGER NOT NULL,
            PRIMARY KEY (chain, first)
        ) WITHOUT ROWID
        """,
        # The states before the last gaps of the branch: what follows a gap may be the work of a wrong clock. The newest
        # have the largest row ids.
        """
        CREATE TABLE consensus_former_states (
            chain BLOB NOT NULL,
            statement BLOB NOT NULL,
            state BLOB NOT NULL,
            PRIMARY KEY (chain, statement)
        )
        """,
    ),
    (
        # When each chain of the tables above was last followed, Unix time.
        """
        CREATE TABLE consensus_chains (
            chain BLOB PRIMARY KEY,
            followed_at_s INTEGER NOT NULL
        ) WITHOUT ROWID
        """,
    ),
    (
        # Own observations behind readings that are committed to, and not published before the readings are revealed.
        "CREATE TABLE consensus_withheld (chain BLOB NOT NULL, envelope BLOB NOT NULL)",
        "CREATE INDEX consensus_withheld_by_chain ON consensus_withheld (chain)",
    ),
    (
        # The numbers of the last observations are given again once these are deleted: what commits have named must not
        # be beyond the rest.
        """
        CREATE TRIGGER named_observation_dropped AFTER DELETE ON observations BEGIN
            UPDATE consensus_named SET number = (SELECT ifnull(max(number), 0) FROM observations)
                WHERE number > (SELECT ifnull(max(number), 0) FROM observations);
        END
        """,
        "UPDATE consensus_named SET number = min(number, (SELECT ifnull(max(number), 0) FROM observations))",
    ),
)
