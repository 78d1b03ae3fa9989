-- migrate:up

-- Who sends: a router's life, by its id and start epoch. `last` is its newest batch that is written, `digest` that of it.
CREATE TABLE producer (
    id integer GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    router_id text NOT NULL,
    start_epoch bigint NOT NULL,
    last bigint NOT NULL DEFAULT 0,
    digest bytea NOT NULL DEFAULT '',
    dropped_records bigint NOT NULL DEFAULT 0,
    dropped_requests bigint NOT NULL DEFAULT 0,
    seen timestamptz NOT NULL DEFAULT now(),
    UNIQUE (router_id, start_epoch)
);

-- What records are about, by number.
CREATE TABLE series (
    id integer GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    tenant text NOT NULL,
    model text NOT NULL,
    version text NOT NULL,
    region text NOT NULL,
    worker_type text NOT NULL,
    UNIQUE (tenant, model, version, region, worker_type)
);

-- Series with some of their names only, those of a cube (services/ledger/storage/cubes.py); the others are ''.
CREATE TABLE margin (
    id integer GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    cube text NOT NULL,
    tenant text NOT NULL,
    model text NOT NULL,
    version text NOT NULL,
    region text NOT NULL,
    worker_type text NOT NULL,
    UNIQUE (cube, tenant, model, version, region, worker_type)
);

CREATE TABLE kind (
    id smallint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    outcome text NOT NULL,
    status text NOT NULL,
    UNIQUE (outcome, status)
);

-- Records, a partition for each day. All columns have a fixed width and no nulls, so that rows go in and out as arrays
-- (services/ledger/storage/usage_rows.py).
CREATE TABLE usage (
    at timestamptz NOT NULL,
    sequence bigint NOT NULL,
    total_us bigint NOT NULL,
    router_us bigint NOT NULL,
    cache_us bigint NOT NULL,
    queue_us bigint NOT NULL,
    run_us bigint NOT NULL,
    compute_us bigint NOT NULL,
    saved_us bigint NOT NULL,
    request_bytes bigint NOT NULL,
    response_bytes bigint NOT NULL,
    producer integer NOT NULL,
    series integer NOT NULL,
    requests integer NOT NULL,
    batch_requests integer NOT NULL,
    batch_rows integer NOT NULL,
    rows integer NOT NULL,
    kind smallint NOT NULL,
    trace_id uuid NOT NULL
) PARTITION BY RANGE (at);

CREATE INDEX usage_at ON usage (at);
-- Folded hits have no trace.
CREATE INDEX usage_trace ON usage (trace_id) WHERE trace_id <> '00000000-0000-0000-0000-000000000000';

CREATE TABLE rollup_minute (
    at timestamptz NOT NULL,
    series integer NOT NULL,
    requests bigint NOT NULL,
    hits bigint NOT NULL,
    errors bigint NOT NULL,
    compute_us bigint NOT NULL,
    saved_us bigint NOT NULL,
    error_us bigint NOT NULL,
    router_us bigint NOT NULL,
    total_us bigint NOT NULL,
    request_bytes bigint NOT NULL,
    response_bytes bigint NOT NULL,
    PRIMARY KEY (at, series)
) PARTITION BY RANGE (at);

CREATE TABLE rollup_hour (LIKE rollup_minute INCLUDING INDEXES) PARTITION BY RANGE (at);
CREATE TABLE rollup_day (LIKE rollup_minute INCLUDING INDEXES) PARTITION BY RANGE (at);

-- The same sums by margin: a report by tenant reads hundreds of rows a day and not tens of thousands.
CREATE TABLE margin_minute (LIKE rollup_minute INCLUDING INDEXES) PARTITION BY RANGE (at);
CREATE TABLE margin_hour (LIKE rollup_minute INCLUDING INDEXES) PARTITION BY RANGE (at);
CREATE TABLE margin_day (LIKE rollup_minute INCLUDING INDEXES) PARTITION BY RANGE (at);

-- Another one after every change of a day's roll-ups: answers that were cached under an older one are not found any more.
CREATE TABLE day_version (
    day date PRIMARY KEY,
    version bigint NOT NULL
);

CREATE TABLE worker (
    id integer GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    worker_id text NOT NULL,
    worker_type text NOT NULL,
    region text NOT NULL,
    UNIQUE (worker_id, worker_type, region)
);

-- Bit i of `seconds`: the worker was up in second i.
CREATE TABLE worker_minute (
    at timestamptz NOT NULL,
    worker integer NOT NULL,
    seconds bigint NOT NULL,
    PRIMARY KEY (at, worker)
) PARTITION BY RANGE (at);

-- Time that the workers of a type were up.
CREATE TABLE pool_hour (
    at timestamptz NOT NULL,
    region text NOT NULL,
    worker_type text NOT NULL,
    up_us bigint NOT NULL,
    PRIMARY KEY (at, region, worker_type)
);

CREATE TABLE price (
    worker_type text NOT NULL,
    from_at timestamptz NOT NULL,
    until_at timestamptz NOT NULL,
    hourly_nano bigint NOT NULL CHECK (hourly_nano >= 0),
    device text NOT NULL,
    slots integer NOT NULL CHECK (slots > 0),
    power_milliwatts bigint NOT NULL CHECK (power_milliwatts >= 0),
    energy_nano_per_kwh bigint NOT NULL CHECK (energy_nano_per_kwh >= 0),
    PRIMARY KEY (worker_type, from_at),
    CHECK (from_at < until_at)
);

-- What must stay as it was when the ledger began: one row.
CREATE TABLE ledger (
    only_one boolean PRIMARY KEY DEFAULT true CHECK (only_one),
    currency text NOT NULL
);

-- migrate:down

DROP TABLE ledger;
DROP TABLE price;
DROP TABLE pool_hour;
DROP TABLE worker_minute;
DROP TABLE worker;
DROP TABLE day_version;
DROP TABLE margin_day;
DROP TABLE margin_hour;
DROP TABLE margin_minute;
DROP TABLE rollup_day;
DROP TABLE rollup_hour;
DROP TABLE rollup_minute;
DROP TABLE usage;
DROP TABLE kind;
DROP TABLE margin;
DROP TABLE series;
DROP TABLE producer;
