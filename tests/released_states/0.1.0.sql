BEGIN TRANSACTION;
CREATE TABLE "_sqlite_migrations" (
   "id" INTEGER PRIMARY KEY,
   "migration_set" TEXT,
   "name" TEXT,
   "applied_at" TEXT
);
INSERT INTO "_sqlite_migrations" VALUES(1,'adapter_registry','create_tables','2026-11-26 23:26:01.740831+00:00');
INSERT INTO "_sqlite_migrations" VALUES(2,'step_log','create_facts','2026-11-26 23:26:01.769221+00:00');
INSERT INTO "_sqlite_migrations" VALUES(3,'learning_log','create_tables','2026-11-26 23:26:01.821339+00:00');
INSERT INTO "_sqlite_migrations" VALUES(4,'learning_log','index_rewards_by_cycle','2026-11-26 23:26:01.835208+00:00');
CREATE TABLE acting (id INTEGER PRIMARY KEY, adapter TEXT REFERENCES adapters(name), behind INTEGER REFERENCES acting(id), reason TEXT NOT NULL, created_at REAL NOT NULL);
INSERT INTO "acting" VALUES(1,'agent-v0001',NULL,'better',1000000000.0);
CREATE TABLE adapter_events (id INTEGER PRIMARY KEY, adapter TEXT NOT NULL REFERENCES adapters(name), state TEXT NOT NULL, reason TEXT NOT NULL, created_at REAL NOT NULL);
INSERT INTO "adapter_events" VALUES(1,'agent-v0001','registered','',1000000000.0);
INSERT INTO "adapter_events" VALUES(2,'agent-v0001','validated','',1000000001.0);
INSERT INTO "adapter_events" VALUES(3,'agent-v0001','loaded','',1000000002.0);
INSERT INTO "adapter_events" VALUES(4,'agent-v0001','verified','',1000000003.0);
INSERT INTO "adapter_events" VALUES(5,'agent-v0001','acting','',1000000004.0);
CREATE TABLE adapters (version INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, rank INTEGER NOT NULL, parent TEXT REFERENCES adapters(name), digest TEXT NOT NULL, created_at REAL NOT NULL);
INSERT INTO "adapters" VALUES(1,'agent-v0001',16,NULL,'d1',1000000000.0);
CREATE TABLE "corrections" (
   "id" TEXT PRIMARY KEY NOT NULL,
   "step_id" TEXT NOT NULL REFERENCES "steps"("id"),
   "action" TEXT NOT NULL,
   "completion_token_ids" BLOB NOT NULL,
   "source" TEXT NOT NULL,
   "created_at" REAL NOT NULL
) STRICT;
INSERT INTO "corrections" VALUES('corr_18ebbbfb5c1741902f2407a7','step_18ebbbfb2eb46744ca31f254','{"type":"final_answer","text":"Good day.","reasoning":""}',X'260000004E0000004E00000043000000DC0000004300000040000000580000000D00000002010000','user',1.79573556469351649283e+09);
CREATE TABLE cycles (id INTEGER PRIMARY KEY, cycle TEXT NOT NULL, stage TEXT NOT NULL, done INTEGER NOT NULL, total INTEGER NOT NULL, message TEXT NOT NULL, report TEXT NOT NULL, created_at REAL NOT NULL);
INSERT INTO "cycles" VALUES(1,'c1','collect',0,0,'','{}',1.7957355648606774807e+09);
INSERT INTO "cycles" VALUES(2,'c1','promoted',0,0,'agent-v0001: better','{"last_step_id": "step_18ebbbfb2eb46744ca31f254"}',1.79573556488097167008e+09);
CREATE TABLE "episodes" (
   "id" TEXT PRIMARY KEY NOT NULL,
   "actor" TEXT NOT NULL,
   "purpose" TEXT NOT NULL,
   "adapter" TEXT NOT NULL,
   "task" TEXT,
   "metadata" TEXT NOT NULL,
   "created_at" REAL NOT NULL
) STRICT;
INSERT INTO "episodes" VALUES('ep_old','policy','serve','base',NULL,'{"who":"ann"}',1.79573556393194746971e+09);
INSERT INTO "episodes" VALUES('demo_ecdac35c86f8e7744ef64c319881a4db','expert','serve','expert',NULL,'{"digest":"ecdac35c86f8e7744ef64c319881a4db5d3d1d3ae438f189b469cdde11b67080"}',1.7957355648443615436e+09);
CREATE TABLE gate_decisions (id INTEGER PRIMARY KEY, cycle TEXT NOT NULL, candidate TEXT NOT NULL, against TEXT NOT NULL, promote INTEGER NOT NULL, reason TEXT NOT NULL, evidence TEXT NOT NULL, created_at REAL NOT NULL);
INSERT INTO "gate_decisions" VALUES(1,'c1','agent-v0001','base',1,'better','{"gain": 0.1}',1.79573556486809206007e+09);
CREATE TABLE "outcomes" (
   "id" TEXT PRIMARY KEY NOT NULL,
   "episode_id" TEXT NOT NULL REFERENCES "episodes"("id"),
   "value" REAL NOT NULL,
   "source" TEXT NOT NULL,
   "note" TEXT NOT NULL,
   "created_at" REAL NOT NULL
) STRICT;
INSERT INTO "outcomes" VALUES('out_18ebbbfb51a3b13876140afe','ep_old',0.5,'user','',1.7957355645181674957e+09);
CREATE TABLE step_rewards (step_id TEXT NOT NULL, cycle TEXT NOT NULL, source TEXT NOT NULL, value REAL NOT NULL, created_at REAL NOT NULL, PRIMARY KEY (step_id, cycle, source)) WITHOUT ROWID;
INSERT INTO "step_rewards" VALUES('step_18ebbbfb2eb46744ca31f254','c1','expert_agreement',1.0,1.79573556486738967899e+09);
CREATE TABLE "steps" (
   "id" TEXT PRIMARY KEY NOT NULL,
   "episode_id" TEXT NOT NULL REFERENCES "episodes"("id"),
   "parent_id" TEXT REFERENCES "steps"("id"),
   "step_index" INTEGER NOT NULL,
   "new_messages" TEXT NOT NULL,
   "tools_digest" TEXT NOT NULL REFERENCES "tool_sets"("digest"),
   "prefix_len" INTEGER NOT NULL,
   "prompt_suffix" BLOB NOT NULL,
   "num_prompt_tokens" INTEGER NOT NULL,
   "completion_token_ids" BLOB NOT NULL,
   "num_completion_tokens" INTEGER NOT NULL,
   "tokens_crc32" INTEGER NOT NULL,
   "behavior_logprobs" BLOB,
   "mean_logprob" REAL,
   "sampling" TEXT NOT NULL,
   "adapter" TEXT NOT NULL,
   "action" TEXT NOT NULL,
   "finish_reason" TEXT NOT NULL,
   "stop_reason" TEXT,
   "tool_results" TEXT NOT NULL,
   "conversation_digest" TEXT NOT NULL,
   "created_at" REAL NOT NULL,
   "first_token_ms" REAL NOT NULL,
   "latency_ms" REAL NOT NULL
) STRICT;
INSERT INTO "steps" VALUES('step_18ebbbfb2eb46744ca31f254','ep_old',NULL,0,'[{"role":"user","content":"Hello"}]','4f53cda18c2baa0c0354bb5f9a3ecbe5ed12ab4d8e11ba873c2f11161202b945',0,X'0401000027000000440000004B0000004B0000004E0000000201000007010000',8,X'27000000480000000D00000002010000',4,3463274876,X'000000BF000000BF000000BF000000BF',-0.5,'{"max_tokens":2040,"temperature":1.0,"top_p":1.0,"top_k":0,"seed":null,"stop_token_ids":[258],"num_top_logprobs":0,"grammar":null}','base','{"type":"final_answer","text":"Hi.","reasoning":""}','stop','final_answer','[]','646787984992f36ce54c1369da66d3ffc0a87858b4dcbdbf98cc44f22eaa5d31',1.795735563941082716e+09,3.52453000232344493269e-01,5.684340003426768817e-01);
INSERT INTO "steps" VALUES('step_18ebbbfb39d7a1babc8c52fa','ep_old','step_18ebbbfb2eb46744ca31f254',1,'[{"role":"user","content":"Again"}]','4f53cda18c2baa0c0354bb5f9a3ecbe5ed12ab4d8e11ba873c2f11161202b945',12,X'06010000200000004600000040000000480000004D0000000201000007010000',20,X'3200000044000000420000004E0000004D000000430000000D00000002010000',8,3743595512,X'000000BF000000BF000000BF000000BF000000BF000000BF000000BF000000BF',-0.5,'{"max_tokens":2028,"temperature":1.0,"top_p":1.0,"top_k":0,"seed":null,"stop_token_ids":[258],"num_top_logprobs":0,"grammar":null}','base','{"type":"final_answer","text":"Second.","reasoning":""}','stop','final_answer','[]','6f1defcba8b74bc093b6c259a7b47fb9c0428a283b2894cccd8ef1c431188121',1.79573556411948204039e+09,2.07227999908354831859e-01,4.22857999637926695868e-01);
INSERT INTO "steps" VALUES('step_18ebbbfb6521402bc6479d26','demo_ecdac35c86f8e7744ef64c319881a4db',NULL,0,'[{"role":"user","content":"Hello"}]','4f53cda18c2baa0c0354bb5f9a3ecbe5ed12ab4d8e11ba873c2f11161202b945',0,X'0401000027000000440000004B0000004B0000004E0000000201000007010000',8,X'260000004E0000004E00000043000000DC0000004300000040000000580000000D00000002010000',10,1331328367,NULL,NULL,'{"max_tokens":256,"temperature":1.0,"top_p":1.0,"top_k":0,"seed":null,"stop_token_ids":[],"num_top_logprobs":0,"grammar":null}','expert','{"type":"final_answer","text":"Good day.","reasoning":""}','stop','final_answer','[]','',1.79573556484517621997e+09,0.0,0.0);
CREATE TABLE "tool_sets" (
   "digest" TEXT PRIMARY KEY NOT NULL,
   "tools" TEXT NOT NULL
) STRICT;
INSERT INTO "tool_sets" VALUES('4f53cda18c2baa0c0354bb5f9a3ecbe5ed12ab4d8e11ba873c2f11161202b945','[]');
CREATE UNIQUE INDEX "idx__sqlite_migrations_migration_set_name"
    ON "_sqlite_migrations" ("migration_set", "name");
CREATE INDEX adapter_events_by_adapter ON adapter_events(adapter, id);
CREATE TRIGGER adapters_no_update BEFORE UPDATE ON adapters BEGIN SELECT RAISE(ABORT, 'adapters is append-only'); END;
CREATE TRIGGER adapters_no_delete BEFORE DELETE ON adapters BEGIN SELECT RAISE(ABORT, 'adapters is append-only'); END;
CREATE TRIGGER adapter_events_no_update BEFORE UPDATE ON adapter_events BEGIN SELECT RAISE(ABORT, 'adapter_events is append-only'); END;
CREATE TRIGGER adapter_events_no_delete BEFORE DELETE ON adapter_events BEGIN SELECT RAISE(ABORT, 'adapter_events is append-only'); END;
CREATE TRIGGER acting_no_update BEFORE UPDATE ON acting BEGIN SELECT RAISE(ABORT, 'acting is append-only'); END;
CREATE TRIGGER acting_no_delete BEFORE DELETE ON acting BEGIN SELECT RAISE(ABORT, 'acting is append-only'); END;
CREATE INDEX "idx_episodes_purpose_id"
    ON "episodes" ("purpose", "id");
CREATE INDEX "idx_episodes_actor_id"
    ON "episodes" ("actor", "id");
CREATE INDEX "idx_episodes_adapter_id"
    ON "episodes" ("adapter", "id");
CREATE INDEX "idx_episodes_task_id"
    ON "episodes" ("task", "id");
CREATE INDEX "idx_steps_episode_id_created_at"
    ON "steps" ("episode_id", "created_at");
CREATE INDEX "idx_steps_conversation_digest_created_at"
    ON "steps" ("conversation_digest", "created_at");
CREATE INDEX "idx_steps_parent_id"
    ON "steps" ("parent_id");
CREATE INDEX "idx_outcomes_episode_id_created_at"
    ON "outcomes" ("episode_id", "created_at");
CREATE INDEX "idx_corrections_step_id"
    ON "corrections" ("step_id");
CREATE TRIGGER episodes_refuse_update BEFORE UPDATE ON episodes BEGIN SELECT RAISE(ABORT, 'episodes are facts: they are appended, never edited. UPDATE refused.'); END;
CREATE TRIGGER episodes_refuse_delete BEFORE DELETE ON episodes BEGIN SELECT RAISE(ABORT, 'episodes are facts: they are appended, never edited. DELETE refused.'); END;
CREATE TRIGGER episodes_refuse_replace BEFORE INSERT ON episodes WHEN EXISTS (SELECT 1 FROM episodes WHERE id = NEW.id) BEGIN SELECT RAISE(ABORT, 'episodes are facts: what is logged once is never replaced. A second id of the same name refused.'); END;
CREATE TRIGGER steps_refuse_update BEFORE UPDATE ON steps BEGIN SELECT RAISE(ABORT, 'steps are facts: they are appended, never edited. UPDATE refused.'); END;
CREATE TRIGGER steps_refuse_delete BEFORE DELETE ON steps BEGIN SELECT RAISE(ABORT, 'steps are facts: they are appended, never edited. DELETE refused.'); END;
CREATE TRIGGER steps_refuse_replace BEFORE INSERT ON steps WHEN EXISTS (SELECT 1 FROM steps WHERE id = NEW.id) BEGIN SELECT RAISE(ABORT, 'steps are facts: what is logged once is never replaced. A second id of the same name refused.'); END;
CREATE TRIGGER outcomes_refuse_update BEFORE UPDATE ON outcomes BEGIN SELECT RAISE(ABORT, 'outcomes are facts: they are appended, never edited. UPDATE refused.'); END;
CREATE TRIGGER outcomes_refuse_delete BEFORE DELETE ON outcomes BEGIN SELECT RAISE(ABORT, 'outcomes are facts: they are appended, never edited. DELETE refused.'); END;
CREATE TRIGGER outcomes_refuse_replace BEFORE INSERT ON outcomes WHEN EXISTS (SELECT 1 FROM outcomes WHERE id = NEW.id) BEGIN SELECT RAISE(ABORT, 'outcomes are facts: what is logged once is never replaced. A second id of the same name refused.'); END;
CREATE TRIGGER corrections_refuse_update BEFORE UPDATE ON corrections BEGIN SELECT RAISE(ABORT, 'corrections are facts: they are appended, never edited. UPDATE refused.'); END;
CREATE TRIGGER corrections_refuse_delete BEFORE DELETE ON corrections BEGIN SELECT RAISE(ABORT, 'corrections are facts: they are appended, never edited. DELETE refused.'); END;
CREATE TRIGGER corrections_refuse_replace BEFORE INSERT ON corrections WHEN EXISTS (SELECT 1 FROM corrections WHERE id = NEW.id) BEGIN SELECT RAISE(ABORT, 'corrections are facts: what is logged once is never replaced. A second id of the same name refused.'); END;
CREATE TRIGGER tool_sets_refuse_update BEFORE UPDATE ON tool_sets BEGIN SELECT RAISE(ABORT, 'tool_sets are facts: they are appended, never edited. UPDATE refused.'); END;
CREATE TRIGGER tool_sets_refuse_delete BEFORE DELETE ON tool_sets BEGIN SELECT RAISE(ABORT, 'tool_sets are facts: they are appended, never edited. DELETE refused.'); END;
CREATE TRIGGER tool_sets_refuse_replace BEFORE INSERT ON tool_sets WHEN EXISTS (SELECT 1 FROM tool_sets WHERE digest = NEW.digest) BEGIN SELECT RAISE(ABORT, 'tool_sets are facts: what is logged once is never replaced. A second digest of the same name refused.'); END;
CREATE VIEW "episode_text" AS 
SELECT lines.episode_id, episodes.task, episodes.adapter, lines.step_index,
       CASE WHEN lines.speaker = 'agent' AND episodes.actor = 'expert' THEN 'expert' ELSE lines.speaker END AS speaker,
       lines.text
FROM (
    SELECT episode_id, created_at, steps.id AS step_id, step_index, 0 AS part, message.key AS line,
           json_extract(message.value, '$.role') AS speaker, CASE json_type(message.value, '$.content')
        WHEN 'array' THEN (
            SELECT group_concat(coalesce(json_extract(part.value, '$.text'),
                                         '[' || json_extract(part.value, '$.type') || ']'), ' ')
            FROM json_each(message.value, '$.content') AS part)
        ELSE json_extract(message.value, '$.content') END AS text
    FROM steps, json_each(steps.new_messages) AS message
    WHERE NOT EXISTS (
        SELECT 1 FROM steps AS parent, json_each(parent.tool_results) AS result
        WHERE parent.id = steps.parent_id AND json_extract(message.value, '$.role') = 'tool'
          AND json_extract(result.value, '$.tool_call_id') = json_extract(message.value, '$.tool_call_id'))
  UNION ALL
    SELECT episode_id, created_at, steps.id, step_index, 0, message.key + 0.5,
           json_extract(message.value, '$.role'),
           coalesce(json_extract(call.value, '$.function.name'), '?') || '(' || coalesce(CASE WHEN CASE WHEN json_valid(json_extract(call.value, '$.function.arguments')) THEN json_type(json_extract(call.value, '$.function.arguments')) = 'object' END THEN (SELECT group_concat(argument.key || '=' || CASE argument.type
            WHEN 'text' THEN json_quote(argument.value) WHEN 'null' THEN 'null'
            WHEN 'true' THEN 'true' WHEN 'false' THEN 'false' ELSE argument.value END, ', ')
        FROM json_each(json_extract(call.value, '$.function.arguments')) AS argument) ELSE json_extract(call.value, '$.function.arguments') END, '') || ')'
    FROM steps, json_each(steps.new_messages) AS message, json_each(message.value, '$.tool_calls') AS call
  UNION ALL
    SELECT episode_id, created_at, id, step_index, 1, -3, 'agent', '(thinks) ' || json_extract(action, '$.reasoning')
    FROM steps WHERE json_extract(action, '$.reasoning') <> ''
  UNION ALL
    SELECT episode_id, created_at, id, step_index, 1, -2, 'agent', json_extract(action, '$.text')
    FROM steps
  UNION ALL
    SELECT episode_id, created_at, id, step_index, 1, -1, 'agent', '(malformed) ' || json_extract(action, '$.problem')
    FROM steps
  UNION ALL
    SELECT episode_id, created_at, steps.id, step_index, 1, call.key, 'agent',
           coalesce(json_extract(call.value, '$.name'), '?') || '(' || coalesce(CASE WHEN CASE WHEN json_valid(json_extract(call.value, '$.arguments')) THEN json_type(json_extract(call.value, '$.arguments')) = 'object' END THEN (SELECT group_concat(argument.key || '=' || CASE argument.type
            WHEN 'text' THEN json_quote(argument.value) WHEN 'null' THEN 'null'
            WHEN 'true' THEN 'true' WHEN 'false' THEN 'false' ELSE argument.value END, ', ')
        FROM json_each(json_extract(call.value, '$.arguments')) AS argument) ELSE json_extract(call.value, '$.arguments') END, '') || ')'
    FROM steps, json_each(steps.action, '$.calls') AS call
  UNION ALL
    SELECT episode_id, created_at, steps.id, step_index, 2, result.key, 'tool',
           CASE WHEN json_extract(result.value, '$.is_error') THEN '(error) ' ELSE '' END
           || json_extract(result.value, '$.content')
    FROM steps, json_each(steps.tool_results) AS result
  UNION ALL
    SELECT episode_id, 9e999, NULL, NULL, 3, 0, 'outcome',
           value || ' (' || source || ')' || CASE note WHEN '' THEN '' ELSE ' ' || note END
    FROM outcomes
    WHERE NOT EXISTS (
        SELECT 1 FROM outcomes AS later
        WHERE later.episode_id = outcomes.episode_id
          AND (later.created_at, later.id) > (outcomes.created_at, outcomes.id))
) AS lines JOIN episodes ON episodes.id = lines.episode_id
WHERE lines.text <> '' OR lines.part = 2
ORDER BY lines.episode_id, lines.created_at, lines.step_id, lines.part, lines.line;
CREATE VIEW "step_summary" AS 
SELECT id AS step_id, episode_id, parent_id, step_index, adapter, json_extract(action, '$.type') AS action_type,
       (SELECT group_concat(json_extract(call.value, '$.name'), ', ')
        FROM json_each(steps.action, '$.calls') AS call) AS tool_names,
       num_prompt_tokens, num_completion_tokens, finish_reason, stop_reason, first_token_ms, latency_ms, mean_logprob,
       created_at
FROM steps
ORDER BY created_at, id;
CREATE INDEX cycles_by_cycle ON cycles(cycle, id);
CREATE TRIGGER cycles_no_update BEFORE UPDATE ON cycles BEGIN SELECT RAISE(ABORT, 'cycles is append-only'); END;
CREATE TRIGGER cycles_no_delete BEFORE DELETE ON cycles BEGIN SELECT RAISE(ABORT, 'cycles is append-only'); END;
CREATE TRIGGER step_rewards_no_update BEFORE UPDATE ON step_rewards BEGIN SELECT RAISE(ABORT, 'step_rewards is append-only'); END;
CREATE TRIGGER step_rewards_no_delete BEFORE DELETE ON step_rewards BEGIN SELECT RAISE(ABORT, 'step_rewards is append-only'); END;
CREATE TRIGGER gate_decisions_no_update BEFORE UPDATE ON gate_decisions BEGIN SELECT RAISE(ABORT, 'gate_decisions is append-only'); END;
CREATE TRIGGER gate_decisions_no_delete BEFORE DELETE ON gate_decisions BEGIN SELECT RAISE(ABORT, 'gate_decisions is append-only'); END;
CREATE VIEW "cycle_status" AS SELECT newest.cycle, stage, done, total, message, report, started_at, created_at FROM cycles JOIN (SELECT cycle, max(id) AS id, min(created_at) AS started_at FROM cycles GROUP BY cycle) AS newest ON newest.id = cycles.id ORDER BY cycles.id DESC;
CREATE INDEX step_rewards_by_cycle ON step_rewards(cycle, source);
COMMIT;
