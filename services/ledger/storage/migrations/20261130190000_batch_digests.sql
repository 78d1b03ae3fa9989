-- migrate:up

-- Batches that are written, by the day they came. One that comes again is told from another of the same number, however
-- many came meanwhile: two routers may have one id and start epoch, as where a machine was cloned.
CREATE TABLE batch_digest (
    at timestamptz NOT NULL,
    sequence bigint NOT NULL,
    producer integer NOT NULL,
    digest bytea NOT NULL
) PARTITION BY RANGE (at);

CREATE INDEX batch_digest_number ON batch_digest (producer, sequence);

-- migrate:down

DROP TABLE batch_digest;
