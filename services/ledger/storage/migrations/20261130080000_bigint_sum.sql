-- migrate:up

-- sum(bigint) adds and returns numeric, which costs three times as much. Sums that leave bigint are an error here, too.
CREATE AGGREGATE bigint_sum(bigint) (
    sfunc = int8pl,
    stype = bigint,
    combinefunc = int8pl,
    parallel = safe
);

-- migrate:down

DROP AGGREGATE bigint_sum(bigint);
