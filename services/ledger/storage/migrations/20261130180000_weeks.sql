-- migrate:up

-- A report over a month reads the cells of three or four weeks, and of the days at its ends.
CREATE TABLE rollup_week (LIKE rollup_day INCLUDING INDEXES) PARTITION BY RANGE (at);
CREATE TABLE margin_week (LIKE rollup_day INCLUDING INDEXES) PARTITION BY RANGE (at);

DO $$
DECLARE
    kind text;
    month timestamptz;
BEGIN
    FOREACH kind IN ARRAY ARRAY['rollup', 'margin'] LOOP
        FOR month IN EXECUTE format(
            'SELECT DISTINCT date_trunc(''month'', date_bin(''1 week'', at, ''epoch''), ''UTC'') FROM %I', kind || '_day'
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
            'sum(response_bytes) FROM %I GROUP BY 1, 2 ORDER BY 1, 2',
            kind || '_week', kind || '_day'
        );
    END LOOP;
END $$;

-- migrate:down

DROP TABLE rollup_week;
DROP TABLE margin_week;
