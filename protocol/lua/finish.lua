-- End requests with their results; the last outputs are stored in the same step.
--
-- ARGV incarnation  of the worker process
-- ARGV worker       RQ worker name
-- EACH request: id           request id
-- EACH request: execution    the caller's execution
-- EACH request: offset       outputs that are stored before these
-- EACH request: outputs      how many outputs are in blob; 0 for none
-- EACH request: blob         one packed entry of the output log
-- EACH request: result       as RQ's result stream holds it; '' for None
-- EACH request: seconds      how long the execution took
--
-- Returns  per request 'ok', 'already' (this execution finished it before: a reply was lost), 'lost', or
--          'gap <n>' (n outputs are stored, fewer than offset: nothing was done)
--
-- A finish wins over a cancel that the worker has not acted upon: the answer is there.
--
-- What registries and indexes forget of them is one call for each key, not for each request (`batch`): half of what
-- a finish costs. If the script stopped before, a request would have ended all the same: its hash says so, and
-- whoever meets a trace of the execution removes it.
local incarnation, worker = arg(), arg()
local answers, ended, worked, counts = {}, 0, 0, {}
local drops, traces = batch('ZREM'), batch('SREM')
local holds, gone, done = batch('HDEL'), batch('DEL'), batch('ZADD')
for _ = 1, tonumber(arg()) do
  local id, execution, offset, outputs, blob, result, seconds = arg(), arg(), arg(), arg(), arg(), arg(), arg()
  offset, outputs = tonumber(offset), tonumber(outputs)
  local name = KEY.job .. id
  local job = redis.call('HMGET', name, 'execution', 'last', 'origin', 'client', 'result_ttl', 'claimed', 'cancel',
    'rate_limit_key', 'success_callback_name', 'webhooks')
  if job[1] ~= execution or execution == '' then
    if job[2] == execution .. ':finished' then
      answers[#answers + 1] = 'already'
    else
      answers[#answers + 1] = refuse(id, execution, incarnation, job[1], job[3])
    end
  else
    local point = redis.call('HMGET', KEY.checkpoint .. id, 'seq', 'chunks', 'writing')
    local fresh = not (point[1] or point[2] or point[3])
    local stored, have = 0, 0
    if not fresh or offset > 0 or outputs > 0 then
      stored, have = store(id, offset, outputs, blob, number_of(point[1]), '0', '', '', '')
    end
    if not stored then
      answers[#answers + 1] = 'gap ' .. int(have)
    else
      local queue, ttl, composite = job[3], number_of(job[5], DAY), id .. ':' .. execution
      redis.call('HSET', name, 'status', 'finished', 'ended_at', utc(), 'execution', '', 'last', execution .. ':finished')
      if job[7] then redis.call('HDEL', name, 'cancel') end
      add_result(id, '1', worker, execution, seconds_of(job[6]), 'return_value', result)
      redis.call('ZREM', KEY.executions .. id, execution)
      if not fresh then drop_checkpoint(id) end
      -- Most requests have nobody to be told, and no output.
      if job[8] or (job[9] or '') ~= '' or (job[10] or '') ~= '' or redis.call('EXISTS', name .. ':dependents') == 1 then
        share_ttl(id, ttl)
      else
        expire(name, ttl)
        expire(KEY.results .. id, ttl)
        expire(KEY.history .. id, ttl)
        if stored > 0 then expire(KEY.output .. id, ttl) end
      end
      hint(job[4], id, 'end')
      for _, registry in ipairs({ KEY.leases, KEY.failed, KEY.canceled, KEY.scheduled, KEY.deferred, KEY.retries,
        KEY.deadlines, KEY.suspects }) do
        drops.add(registry .. queue, id)
      end
      drops.add(KEY.wip .. queue, composite)
      done.add(KEY.finished .. queue, leaves_at(ttl), id)
      holds.add(KEY.held .. incarnation, id)
      traces.add(KEY.worker .. worker .. ':executions', composite)
      gone.add(KEY.execution .. composite)
      counts[queue] = (counts[queue] or 0) + 1
      ended, worked = ended + 1, worked + (tonumber(seconds) or 0)
      answers[#answers + 1] = 'ok'
    end
  end
end
for _, calls in ipairs({ drops, done, holds, traces, gone }) do calls.send() end
for queue, number in pairs(counts) do count('finished', queue, number) end
if ended > 0 and redis.call('EXISTS', KEY.worker .. worker) == 1 then
  add(KEY.worker .. worker, 'successful_job_count', ended)
  redis.pcall('HINCRBYFLOAT', KEY.worker .. worker, 'total_working_time', string.format('%.6f', worked))
end
show_state(worker, incarnation)
return answers
