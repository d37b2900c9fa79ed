{{- /* In all of these, "scope" is a dict: root (the chart's context), service, spec, process, settings. */ -}}

{{- define "tenfold.name" -}}
{{- $name := contains .Chart.Name .Release.Name | ternary .Release.Name (printf "%s-%s" .Release.Name .Chart.Name) }}
{{- $name | trunc 40 | trimSuffix "-" }}
{{- end }}

{{- define "tenfold.image" -}}
{{ .root.Values.image.repository }}/{{ .service }}:{{ .root.Values.image.tag | default .root.Chart.AppVersion }}
{{- end }}

{{- define "tenfold.selector" -}}
app.kubernetes.io/name: {{ .service }}
app.kubernetes.io/component: {{ .process }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
{{- end }}

{{- define "tenfold.labels" -}}
{{ include "tenfold.selector" . }}
app.kubernetes.io/part-of: tenfold
app.kubernetes.io/version: {{ .root.Values.image.tag | default .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ .root.Chart.Name }}-{{ .root.Chart.Version }}
{{- end }}

{{- /* Restricted pod security, for Deployments and Jobs alike. */ -}}
{{- define "tenfold.podSecurity" -}}
automountServiceAccountToken: false
securityContext:
  runAsNonRoot: true
  runAsUser: 10001
  runAsGroup: 10001
  fsGroup: 10001
  seccompProfile: {type: RuntimeDefault}
{{- with .root.Values.image.pullSecrets }}
imagePullSecrets: {{- toYaml . | nindent 2 }}
{{- end }}
volumes:
  - name: tmp
    emptyDir: {sizeLimit: 1Gi}
{{- end }}

{{- define "tenfold.containerSecurity" -}}
image: {{ include "tenfold.image" . }}
imagePullPolicy: {{ .root.Values.image.pullPolicy }}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities: {drop: [ALL]}
volumeMounts:
  - name: tmp
    mountPath: /tmp
{{- end }}

{{- /* Plain settings from values; secrets from the service's existing Secret. */ -}}
{{- define "tenfold.env" -}}
{{- $values := .root.Values -}}
{{- $env := dict "HOST" "0.0.0.0" "PORT" "8000" "ADMIN_PORT" "9000" "DRAIN_SECONDS" (toString $values.drainSeconds) -}}
{{- $env = merge $env (dict "BUS" "kafka" "KAFKA_BOOTSTRAP" $values.kafka.bootstrap) -}}
{{- $env = merge $env (dict "KAFKA_PARTITIONS" (toString $values.kafka.partitions) "KAFKA_REPLICATION" (toString $values.kafka.replication)) -}}
{{- with .settings.pool }}{{ $env = merge $env (dict "DATABASE_POOL_MAX" (toString .)) }}{{ end -}}
{{- $env = mergeOverwrite $env $values.env (.spec.env | default dict) -}}
env:
{{- range $name := keys $env | sortAlpha }}
  - name: {{ $name }}
    value: {{ tpl (get $env $name) $.root | quote }}
{{- end }}
envFrom:
  - secretRef: {name: {{ .spec.secret }}}
{{- end }}

{{- /* Refuses what cannot work, with the arithmetic. */ -}}
{{- define "tenfold.check" -}}
{{- $used := 0 -}}
{{- $lines := list -}}
{{- range $service, $spec := .Values.services -}}
  {{- range $process, $settings := $spec.processes -}}
    {{- if lt (int $settings.replicas.max) (int $settings.replicas.min) -}}
      {{- fail (printf "services.%s.processes.%s: replicas.max %d is less than replicas.min %d" $service $process (int $settings.replicas.max) (int $settings.replicas.min)) -}}
    {{- end -}}
    {{- if and (eq $process "worker") (gt (int $settings.replicas.max) (int $.Values.kafka.partitions)) -}}
      {{- fail (printf "services.%s.processes.worker: replicas.max %d is more than kafka.partitions %d: the rest would have nothing to do" $service (int $settings.replicas.max) (int $.Values.kafka.partitions)) -}}
    {{- end -}}
    {{- with $settings.pool -}}
      {{- $connections := mul (add $settings.replicas.max 1) . -}}
      {{- $used = add $used $connections -}}
      {{- $lines = append $lines (printf "  %s %s: (%d replicas + 1 surge) x %d = %d" $service $process (int $settings.replicas.max) (int .) $connections) -}}
    {{- end -}}
  {{- end -}}
  {{- if $spec.migrations -}}
    {{- $used = add $used 1 -}}
    {{- $lines = append $lines (printf "  %s migrations: 1" $service) -}}
  {{- end -}}
{{- end -}}
{{- $budget := sub .Values.database.maxConnections .Values.database.reserve -}}
{{- if gt $used $budget -}}
  {{- fail (printf "\nThe connection budget does not fit:\n%s\n  sum: %d, more than maxConnections %d - reserve %d = %d\nLower replicas.max or pool, or raise database.maxConnections to what the server has." (join "\n" $lines) $used (int .Values.database.maxConnections) (int .Values.database.reserve) $budget) -}}
{{- end -}}
{{- end }}
