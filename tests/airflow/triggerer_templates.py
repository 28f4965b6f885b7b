"""
Templates for ``start_from_trigger``, and what Airflow 3.3.2's triggerer makes of them.

``tests/unit/test_triggers_templates.py`` holds the package's check against them, and
``tests/airflow/test_start_from_trigger_processes.py`` a real triggerer.
"""

from __future__ import annotations

DAG_ID = "templates"
RUN_ID = "the-run"
LOGICAL_DATE = "2026-01-02T03:04:05+00:00"
TEXT_OF_DATE = "2026-01-02 03:04:05+00:00"
# A name of params here would replace that param.
CONF = {"asked": "from-conf", "deep": {"x": ["y"]}}
PARAMS = {"run": "from-params", "mixed": "Ab-c", "nest": {"a": ["x", "y"]}}
VARIABLES = {"v": "from-variable", "j": '{"a": "from-json"}'}
CONNECTION = {
    "conn_type": "dify",
    "host": "h.example",
    "login": "someone",
    "password": "the-password",
    "port": 81,
    "schema": "https",
    "extra": {"timeout": 7},
}
# What the upstream tasks "up", "pieces" and "many" (mapped over 0 and 1) return.
UP = "from-up"
PIECES = {"id": "from-pieces", "list": ["a", "b"]}
MANY = ["m0", "m1"]

# What the triggerer renders. {task_id} is the rendering task's own.
WORKS: dict[str, str] = {
    "plain": "plain",
    "{# a comment #}plain": "plain",
    "{% raw %}{{ x }}{% endraw %}": "{{ x }}",
    "{{ params.run }}": "from-params",
    "{{ params['run'] }}": "from-params",
    "{{ params.nest.a[0] }}-{{ params.nest['a'][-1] }}": "x-y",
    "{{ params.get('nosuch', 'other') }}": "other",
    "{{ dag_run.conf['asked'] }}": "from-conf",
    "{{ dag_run.conf.deep.x[0] }}": "y",
    "{{ (dag_run.conf or {}).get('asked') }}": "from-conf",
    "{{ var.value.v }}": "from-variable",
    "{{ var.value['v'] }}": "from-variable",
    "{{ var.value.get('v') }}": "from-variable",
    "{{ var.value.get('nosuch', 'other') }}": "other",
    "{{ var.json.j.a }}": "from-json",
    "{{ var.json.j['a'] }}": "from-json",
    "{{ var.json.get('j').a }}": "from-json",
    "{{ conn.c.conn_id }}": "c",
    "{{ conn['c'].conn_type }}": "dify",
    "{{ conn.c.host }}:{{ conn.c.port }}": "h.example:81",
    "{{ conn.c.schema }}": "https",
    "{{ conn.c.login }}": "someone",
    "{{ conn.c.extra_dejson.timeout }}": "7",
    "{{ ds }}": "2026-01-02",
    "{{ ds_nodash }}": "20260102",
    "{{ ts }}": LOGICAL_DATE,
    "{{ ts_nodash }}": "20260102T030405",
    "{{ ts_nodash_with_tz }}": "20260102T030405+0000",
    "{{ logical_date }}": TEXT_OF_DATE,
    "{{ logical_date.year }}": "2026",
    "{{ logical_date.isoformat() }}": LOGICAL_DATE,
    "{{ logical_date.strftime('%d.%m.') }}": "02.01.",
    "{{ data_interval_start }}": TEXT_OF_DATE,
    "{{ data_interval_end }}": TEXT_OF_DATE,
    "{{ run_id }}": RUN_ID,
    "{{ dag_run.dag_id }}": DAG_ID,
    "{{ dag_run.run_id }}": RUN_ID,
    "{{ dag_run.logical_date }}": TEXT_OF_DATE,
    "{{ dag_run.data_interval_start }}": TEXT_OF_DATE,
    "{{ dag_run.data_interval_end }}": TEXT_OF_DATE,
    "{{ dag_run.run_after is defined and dag_run.run_after is not none }}": "True",
    "{{ dag_run.start_date is defined and dag_run.start_date is not none }}": "True",
    "{{ ti.dag_id }}": DAG_ID,
    "{{ ti.run_id }}": RUN_ID,
    "{{ ti.task_id }}": "{task_id}",
    "{{ ti['task_id'] }}": "{task_id}",
    "{{ ti.map_index }}": "-1",
    "{{ ti.try_number }}": "1",
    "{{ (ti.id | string | length) == 36 }}": "True",
    "{{ task_instance.dag_id }}": DAG_ID,
    "{{ task_instance.run_id }}": RUN_ID,
    "{{ task_instance.task_id }}": "{task_id}",
    "{{ task_instance.map_index }}": "-1",
    "{{ task_instance.try_number }}": "1",
    "{{ (task_instance.id | string | length) == 36 }}": "True",
    "{{ task_instance_key_str }}": DAG_ID + "__{task_id}__20260102",
    "{{ dag.dag_id }}": DAG_ID,
    "{{ task.task_id }}": "{task_id}",
    "{{ ti.xcom_pull(task_ids='up', map_indexes=-1) }}": UP,
    "{{ ti.xcom_pull('up', map_indexes=-1) }}": UP,
    "{{ task_instance.xcom_pull('up', map_indexes=-1) }}": UP,
    "{{ ti.xcom_pull('up', map_indexes=None) }}": UP,
    "{{ ti.xcom_pull('up', map_indexes=ti.map_index) }}": UP,
    "{{ ti.xcom_pull(task_ids='pieces', key='id', map_indexes=-1) }}": "from-pieces",
    "{{ ti.xcom_pull('pieces', map_indexes=-1)['id'] }}": "from-pieces",
    "{{ ti.xcom_pull('pieces', map_indexes=-1).list[0] }}": "a",
    "{{ (ti.xcom_pull('pieces', map_indexes=-1) or {}).get('id') }}": "from-pieces",
    "{{ ti.xcom_pull('many', map_indexes=1) }}": "m1",
    "{{ ti.xcom_pull('many', map_indexes=[0, 1]) | join('+') }}": "m0+m1",
    "{{ ti.xcom_pull('nosuch', map_indexes=-1, default='other') }}": "other",
    "{{ ti.xcom_pull('up', map_indexes=-1, dag_id=dag.dag_id, run_id=run_id) }}": UP,
    "{{ ti.xcom_pull('up', map_indexes=-1, include_prior_dates=True) }}": UP,
    "{{ ti.xcom_pull('up', map_indexes=-1) }}-{{ ti.xcom_pull('many', map_indexes=0) }}": "from-up-m0",
    "{{ params.mixed | capitalize }}": "Ab-c",
    "{{ params.mixed | lower }}": "ab-c",
    "{{ params.mixed | upper }}": "AB-C",
    "{{ params.mixed | title }}": "Ab-C",
    "{{ params.mixed | replace('-', '') }}": "Abc",
    "{{ ' x ' | trim }}": "x",
    "{{ params.mixed | length + (params.mixed | count) }}": "8",
    "{{ params.nosuch | default('other') }}": "other",
    "{{ none | d('other', true) }}": "other",
    "{{ [1, 2] | first }}-{{ (1, 2) | last }}": "1-2",
    "{{ '5' | int - 1 }}": "4",
    "{{ '5' | float }}": "5.0",
    "{{ params.nest | tojson }}": '{"a": ["x", "y"]}',
    "{{ logical_date | ds }}": "2026-01-02",
    "{{ logical_date | ds_nodash }}": "20260102",
    "{{ logical_date | ts }}": LOGICAL_DATE,
    "{{ logical_date | ts_nodash }}": "20260102T030405",
    "{{ logical_date | ts_nodash_with_tz }}": "20260102T030405+0000",
    "{{ params.mixed.lower() }}": "ab-c",
    "{{ params.mixed.upper() }}": "AB-C",
    "{{ params.mixed.replace('-', '') }}": "Abc",
    "{{ params.mixed.split('-')[1] }}": "c",
    "{{ ' x '.strip() }}": "x",
    "{{ ds[:4] }}": "2026",
    "{{ {'a': 'b'}['a'] ~ -1 ~ ('c' + 'd') }}": "b-1cd",
    "{{ 'x' if params.run is string and params.nosuch is undefined else 'y' }}": "x",
    "{{ 'x' if 1 < 2 <= 3 and not (params.run in ['a'] or ds == 'b') else 'y' }}": "x",
    "{% if params.nosuch %}x{% elif params.run %}y{% else %}z{% endif %}": "y",
}

# What never gets an answer there, by what the check names.
HANGS: dict[str, str] = {
    "{{ ti.xcom_pull('up') }}": "xcom_pull without map_indexes",
    "{{ task_instance.xcom_pull(task_ids='up', key='k') }}": "xcom_pull without map_indexes",
    "{{ [ti.xcom_pull('up', map_indexes=-1), ti.xcom_pull('up')] | first }}": "xcom_pull without map_indexes",
    "{{ ti['xcom_pull']('up') }}": "xcom_pull without map_indexes",
    "{% set p = ti.xcom_pull %}{{ p('up') }}": "xcom_pull without map_indexes",
    "{{ (ti | attr('xcom_pull'))('up') }}": "xcom_pull without map_indexes",
    "{{ ti.xcom_pull(*['up']) }}": "xcom_pull without map_indexes",
    "{{ [ti.xcom_pull][0]('up') }}": "xcom_pull without map_indexes",
    "{% for p in [ti.xcom_pull] %}{{ p('up') }}{% endfor %}": "xcom_pull without map_indexes",
    "{% with p = ti.xcom_pull %}{{ p('up') }}{% endwith %}": "xcom_pull without map_indexes",
    "{% macro m(p) %}{{ p('up') }}{% endmacro %}{{ m(ti.xcom_pull) }}": "xcom_pull without map_indexes",
    "{{ ti.get_previous_dagrun() }}": "get_previous_dagrun",
    "{{ ti.get_first_reschedule_date({'task_reschedule_count': 1}) }}": "get_first_reschedule_date",
    "{{ ti.get_task_breadcrumbs(dag_id='templates', run_id=run_id) }}": "get_task_breadcrumbs",
    "{{ task_state_store.get('k') }}": "task_state_store",
    "{{ prev_start_date_success }}": "prev_start_date_success",
    "{{ prev_end_date_success }}": "prev_end_date_success",
    "{{ prev_data_interval_start_success }}": "prev_data_interval_start_success",
    "{{ prev_data_interval_end_success }}": "prev_data_interval_end_success",
    "{{ prev_start_date_success | default('x') }}": "prev_start_date_success",
}

# What raises there, though a worker renders it.
FAILS: dict[str, str] = {
    "{{ ti.get_previous_ti() }}": "get_previous_ti",
    "{{ ti.get_previous_start_date() }}": "get_previous_start_date",
}

# What is empty there, or another object than on a worker.
EMPTY: dict[str, str] = {
    "{{ ti.start_date }}": "ti.start_date",
    "{{ ti.hostname }}": "ti.hostname",
    "{{ a_macro_of_the_dag }}": "a_macro_of_the_dag",
    "{{ inlet_events['x'] }}": "inlet_events['x']",
    "{{ outlet_events['x'] }}": "outlet_events['x']",
    "{{ triggering_asset_events.values() | first }}": "triggering_asset_events.values()",
    "{{ dag_run.get_previous_dagrun }}": "dag_run.get_previous_dagrun",
}

REFUSED = {**HANGS, **FAILS}
