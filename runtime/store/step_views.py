"""Two views for people: `episode_text` reads like a transcript, `step_summary` has one line a step.

    sqlite3 -column state/agent.db "select speaker, text from episode_text where episode_id = '...'"

Plain SQL over the JSON columns, so that the sqlite3 shell and Datasette show them without a line of our Python.
Refused: a text column beside the JSON, which could disagree with it.

A column that holds no JSON, or JSON of another shape, costs its own lines and no others; where it is no JSON, a line
says so. SQLite's functions raise an error for such a value, and an error in one row ends the whole query.

Not covered: a branching episode is shown in order of time, not branch by branch; an integer of more than 64 bits is
shown rounded.
"""

from __future__ import annotations


def _read(column: str) -> str:
    """SQL for a column's JSON; an empty list where it is none."""
    return f"CASE WHEN json_valid({column}) THEN {column} ELSE '[]' END"


def _object(element: str) -> str:
    """SQL for an element that json_each found; an empty object where it is none: its value is then no JSON."""
    return f"CASE {element}.type WHEN 'object' THEN {element}.value ELSE '{{}}' END"


_ACTION, _RESULTS, _MESSAGES = (_read(f"steps.{column}") for column in ("action", "tool_results", "new_messages"))
_MESSAGE, _PART, _CALL, _RESULT = map(_object, ("message", "part", "call", "result"))


def _call_text(path: str) -> str:
    """SQL for the call at a path of `call.value`, as one would write it: `pick(item="mug", count=2)`.

    Arguments that are no object (an imported message may hold anything) stand as they are.
    """
    name, arguments = (f"json_extract({_CALL}, '{path}.{field}')" for field in ("name", "arguments"))
    pairs = f"""(SELECT group_concat(argument.key || '=' || CASE argument.type
            WHEN 'text' THEN json_quote(argument.value) WHEN 'null' THEN 'null'
            WHEN 'true' THEN 'true' WHEN 'false' THEN 'false' ELSE argument.value END, ', ')
        FROM json_each({arguments}) AS argument)"""
    is_object = f"CASE WHEN json_valid({arguments}) THEN json_type({arguments}) = 'object' END"
    return (
        f"coalesce({name}, '?') || '(' || coalesce(CASE WHEN {is_object} THEN {pairs} ELSE {arguments} END, '') || ')'"
    )


# What a message says: its content is a string, null, or a list of parts, of which only the texts can be shown.
_CONTENT_TEXT = f"""CASE json_type({_MESSAGE}, '$.content')
        WHEN 'array' THEN (
            SELECT group_concat(coalesce(json_extract({_PART}, '$.text'),
                                         '[' || json_extract({_PART}, '$.type') || ']'), ' ')
            FROM json_each({_MESSAGE}, '$.content') AS part)
        ELSE json_extract({_MESSAGE}, '$.content') END"""

# The results of server-run tools are shown with the step that ran them, not again where the next step sees them.
_SHOWN_WITH_PARENT = f"""EXISTS (
        SELECT 1 FROM steps AS parent, json_each({_read("parent.tool_results")}) AS result
        WHERE parent.id = steps.parent_id AND json_extract({_MESSAGE}, '$.role') = 'tool'
          AND json_extract({_RESULT}, '$.tool_call_id') = json_extract({_MESSAGE}, '$.tool_call_id'))"""

# Every arm yields its lines of the transcript and where they stand: by step, then part of the step, then line.
_LINES = f"""
    SELECT episode_id, created_at, steps.id AS step_id, step_index, 0 AS part, message.key AS line,
           json_extract({_MESSAGE}, '$.role') AS speaker, {_CONTENT_TEXT} AS text
    FROM steps, json_each({_MESSAGES}) AS message
    WHERE NOT {_SHOWN_WITH_PARENT}
  UNION ALL
    SELECT episode_id, created_at, steps.id, step_index, 0, message.key + 0.5,
           json_extract({_MESSAGE}, '$.role'),
           {_call_text("$.function")}
    FROM steps, json_each({_MESSAGES}) AS message, json_each({_MESSAGE}, '$.tool_calls') AS call
  UNION ALL
    SELECT episode_id, created_at, id, step_index, 1, -3, 'agent', '(thinks) ' || json_extract({_ACTION}, '$.reasoning')
    FROM steps WHERE json_extract({_ACTION}, '$.reasoning') <> ''
  UNION ALL
    SELECT episode_id, created_at, id, step_index, 1, -2, 'agent', json_extract({_ACTION}, '$.text')
    FROM steps
  UNION ALL
    SELECT episode_id, created_at, id, step_index, 1, -1, 'agent',
           '(malformed) ' || json_extract({_ACTION}, '$.problem')
    FROM steps
  UNION ALL
    SELECT episode_id, created_at, steps.id, step_index, 1, call.key, 'agent',
           {_call_text("$")}
    FROM steps, json_each({_ACTION}, '$.calls') AS call
  UNION ALL
    SELECT episode_id, created_at, steps.id, step_index, 2, result.key, 'tool',
           CASE WHEN json_extract({_RESULT}, '$.is_error') THEN '(error) ' ELSE '' END
           || json_extract({_RESULT}, '$.content')
    FROM steps, json_each({_RESULTS}) AS result
  UNION ALL
    SELECT episode_id, created_at, id, step_index, 3, 0, 'log', '(a part of this step is damaged)'
    FROM steps WHERE NOT (json_valid(action) AND json_valid(new_messages) AND json_valid(tool_results))
  UNION ALL
    SELECT episode_id, 9e999, NULL, NULL, 3, 0, 'outcome',
           value || ' (' || source || ')' || CASE note WHEN '' THEN '' ELSE ' ' || note END
    FROM outcomes
    WHERE NOT EXISTS (
        SELECT 1 FROM outcomes AS later
        WHERE later.episode_id = outcomes.episode_id
          AND (later.created_at, later.id) > (outcomes.created_at, outcomes.id))"""

EPISODE_TEXT = f"""
SELECT lines.episode_id, episodes.task, episodes.adapter, lines.step_index,
       CASE WHEN lines.speaker = 'agent' AND episodes.actor = 'expert' THEN 'expert' ELSE lines.speaker END AS speaker,
       lines.text
FROM ({_LINES}
) AS lines JOIN episodes ON episodes.id = lines.episode_id
WHERE lines.text <> '' OR lines.part = 2
ORDER BY lines.episode_id, lines.created_at, lines.step_id, lines.part, lines.line
"""
"""Episode id, task, adapter, step index, speaker, text: a row for each thing said, called or returned, in order. The
newest outcome is the last line. Empty words are left out, an empty tool result is shown."""

STEP_SUMMARY = f"""
SELECT id AS step_id, episode_id, parent_id, step_index, adapter, json_extract({_ACTION}, '$.type') AS action_type,
       (SELECT group_concat(json_extract({_CALL}, '$.name'), ', ')
        FROM json_each({_ACTION}, '$.calls') AS call) AS tool_names,
       num_prompt_tokens, num_completion_tokens, finish_reason, stop_reason, first_token_ms, latency_ms, mean_logprob,
       created_at
FROM steps
ORDER BY created_at, id
"""
