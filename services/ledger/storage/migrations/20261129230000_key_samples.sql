-- migrate:up

-- Requests for a sample of the keys: those whose first byte, the highest of `key`, is less than `below`. A partition for
-- each day.
CREATE TABLE key_sample (
    at timestamptz NOT NULL,
    key bigint NOT NULL,
    series integer NOT NULL,
    below smallint NOT NULL,
    cacheable boolean NOT NULL,
    requests bigint NOT NULL,
    compute_us bigint NOT NULL,
    value_bytes bigint NOT NULL
) PARTITION BY RANGE (at);

CREATE INDEX key_sample_at ON key_sample (at);

-- migrate:down

DROP TABLE key_sample;
