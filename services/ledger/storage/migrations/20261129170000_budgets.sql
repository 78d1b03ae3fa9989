-- migrate:up

-- '' is all tenants, or all models.
CREATE TABLE budget (
    id integer GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    tenant text NOT NULL,
    model text NOT NULL,
    period text NOT NULL,
    soft_nano bigint NOT NULL CHECK (soft_nano >= 0),
    hard_nano bigint NOT NULL CHECK (hard_nano >= 0),
    UNIQUE (tenant, model, period)
);

-- What a router may spend of a budget, and has spent without the ledger having the records yet.
CREATE TABLE budget_lease (
    budget integer NOT NULL REFERENCES budget ON DELETE CASCADE,
    router_id text NOT NULL,
    amount_nano bigint NOT NULL CHECK (amount_nano >= 0),
    unsent_nano bigint NOT NULL CHECK (unsent_nano >= 0),
    expires_at timestamptz NOT NULL,
    PRIMARY KEY (budget, router_id)
);

-- migrate:down

DROP TABLE budget_lease;
DROP TABLE budget;
