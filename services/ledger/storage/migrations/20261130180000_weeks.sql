-- migrate:up

-- A report over a month reads the cells of three or four weeks, and of the days at its ends.
CREATE TABLE rollup_week (LIKE rollup_day INCLUDING INDEXES) PARTITION BY RANGE (at);
CREATE TABLE margin_week (LIKE rollup_day INCLUDING INDEXES) PARTITION BY RANGE (at);

-- One row. Weeks before have cells; later ones get theirs when they are over, so that no batch pays for them.
CREATE TABLE weeks_summed (until timestamptz NOT NULL);
INSERT INTO weeks_summed VALUES (date_bin('1 week', now(), 'epoch'));

DO $$
DECLARE
    kind text;
    month timestamptz;
    summed timestamptz := (SELECT until FROM weeks_summed);
BEGIN
    FOREACH kind IN ARRAY ARRAY['rollup', 'margin'] LOOP
        FOR month IN EXECUTE format(
            'SELECT DISTINCT date_trunc(''month'', date_bin(''1 week'', at, ''epoch''), ''UTC'') FROM %I WHERE at < %L', kind || '_day', summed
        ) LOOP
            EXECUTE format(
                'CREATE TABLE %I PARTITION OF %I FOR VALUES FROM (%L) TO (%L) WITH (fillfactor = 70)',
                kind || '_week_' || to_char(month AT TIME ZONE 'UTC', 'YYYYMM'), kind || '_week',
                month, (month AT TIME ZONE 'UTC' + interval '1 month') AT TIME ZONE 'UTC'
            );
        END LOOP;
        EXECUTE format(
            'INSERT INTO %I SELECT date_bin(''1 week'', at, ''epoch''), series, sum(requests), sum(hits), sum(errors), '
            'sum(compute_us), sum(saved_us), sum(error_us), sum(router_us), sum(total_us), sum(request_bytes), '
            'sum(response_bytes) FROM %I WHERE at < %L GROUP BY 1, 2 ORDER BY 1, 2',
            kind || '_week', kind || '_day', summed
        );
    END LOOP;
END $$;

-- migrate:down

DROP TABLE weeks_summed;
DROP TABLE rollup_week;
DROP TABLE margin_week;
